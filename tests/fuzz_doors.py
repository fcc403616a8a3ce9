"""The doors that `fuzzing.py` breaks in at: what opens an input, and how inputs of its format are made."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from fuzzing import EDGES, Door, changed, changed_json, spliced

from ldrt_edge.errors import LdrtError

_ARTICLE = b"""<?xml version="1.0"?><article xmlns:xlink="http://www.w3.org/1999/xlink" xml:lang="en"><front>
<journal-meta><journal-title>J</journal-title></journal-meta><article-meta><article-id pub-id-type="pmc">1</article-id>
<article-id pub-id-type="doi">10.1/x</article-id><title-group><article-title>Low dose</article-title>
</title-group><pub-date pub-type="epub"><day>1</day><month>2</month><year>2020</year></pub-date><permissions>
<license xlink:href="https://creativecommons.org/licenses/by/4.0/"><license-p>CC BY</license-p></license></permissions>
<abstract><p>Pain of the heel.</p></abstract></article-meta></front><body><sec><p>As
<xref ref-type="fig" rid="f1">Fig. 1</xref> shows, the dose. See [<xref rid="f2">2</xref>].</p>
<fig id="f1"><label>Figure 1</label><caption><title>Dose
</title><p>Isodose lines<sup>2</sup>.</p></caption><graphic xlink:href="a.jpg"/></fig><fig-group id="g"><fig id="f2">
<caption xml:lang="de"><p>Dosis</p></caption><alternatives><graphic xlink:href="b.tif"/><graphic xlink:href="b.png"/>
</alternatives></fig></fig-group><table-wrap id="t"><graphic xlink:href="t.png"/></table-wrap></sec></body>
<sub-article article-type="translation" xml:lang="es"><body><fig id="f1es"><caption><p>Dosis</p></caption></fig></body>
</sub-article></article>"""
_XML_PARTS = (
    b"<!DOCTYPE a [<!ENTITY x 'y'>]>", b"&x;", b"&#0;", b"&#x1F600;", b"<![CDATA[x]]>", b"<!-- x -->", b"<?pi x?>",
    b"</p>", b"<fig>", b'<graphic xlink:href="../../x"/>', b'<xref rid="f1"/>', b"\xff\xfe", b"\0",
    b"<year>99999999999</year>",
)  # fmt: skip
_NUMBERS = (
    b"0", b"-1", b"1e9", b"-1e9", b"1e30", b"1e300", b"-1e300", b"1e999", b"1e-300", b"NaN", b"inf", b"9999999999", b"",
    b"x", b"1\\2", b"\\\\",
)  # fmt: skip
Random = random.Random
_TEMPLATE_PARTS = (
    b"{% set x = x ~ x %}", b"{{ 'x' * 9999999999 }}", b"{% for a in messages %}", b"{% endfor %}", b"|join", b"[::-1]",
    b"{% set ns = namespace(a='') %}", b"{% set ns.a = ns.a + message.role %}", b"{% if x %}", b"{{ x.__class__ }}",
)  # fmt: skip


def _scratch() -> Path:
    """A new folder, in memory where there is one."""
    return Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def _through_file(opened: Callable[[Path], object], name: str) -> Callable[[bytes], object]:
    """A door that wants a path."""
    path = _scratch() / name
    path.parent.mkdir(exist_ok=True)

    def open_(data: bytes) -> object:
        path.write_bytes(data)
        return opened(path)

    return open_


def _gguf() -> Door:
    from ldrt_edge.runtimes.gguf_file import check_gguf

    def make(rng: Random) -> bytes:
        data = _gguf_file(rng, hostile=rng.random() < 0.5)
        return changed(rng, data, 600) if rng.random() < 0.7 else data

    return Door(_through_file(check_gguf, "x.gguf"), make)


def _gguf_file(rng: Random, hostile: bool) -> bytes:
    """A GGUF file of a few settings and layers; a hostile one has some numbers that no writer would write."""

    def number(honest: int) -> int:
        return rng.choice(EDGES) if hostile and rng.random() < 0.05 else honest

    def text(value: str) -> bytes:
        return struct.pack("<Q", number(len(value.encode()))) + value.encode()

    scalars = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
    settings = []
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for key, kind, value in (
        ("general.architecture", 8, text("llama")), ("llama.block_count", 4, struct.pack("<I", number(2) & 0xFFFFFFFF)),
        ("llama.attention.head_count", 4, struct.pack("<I", number(4) & 0xFFFFFFFF)),
        ("general.alignment", 4, struct.pack("<I", number(32) & 0xFFFFFFFF)),
        ("tokenizer.chat_template", 8, text(template)),
        ("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, number(3)) + text("a") + text("b") + text("ü")),
        ("tokenizer.ggml.scores", 9, struct.pack("<IQ", 6, number(3)) + struct.pack("<3f", 0, 1, 2)),
    ):  # fmt: skip
        kind = rng.choice(list(scalars)) if hostile and rng.random() < 0.03 else number(kind)
        settings.append(text(key) + struct.pack("<I", kind & 0xFFFFFFFF) + value)
    tensors, data = [], b""
    for name, shape, kind, size in (
        ("token_embd.weight", (32, 3), 0, 384), ("blk.0.a.weight", (32, 2), 8, 68), ("blk.1.a.weight", (32, 2), 8, 68),
        ("output_norm.weight", (32,), 0, 128),
    ):  # fmt: skip
        dimensions = [number(side) & ((1 << 64) - 1) for side in shape]
        place = struct.pack("<IQ", number(kind) & 0xFFFFFFFF, number(len(data)) & ((1 << 64) - 1))
        sides = struct.pack(f"<I{len(dimensions)}Q", number(len(dimensions)) & 0xFFFFFFFF, *dimensions)
        tensors.append(text(name) + sides + place)
        data += bytes(size + -size % 32)
    head = struct.pack("<4sIQQ", b"GGUF", number(3) & 0xFFFFFFFF, number(len(tensors)), number(len(settings)))
    head += b"".join(settings + tensors)
    return head + bytes(-len(head) % 32) + data


def _safetensors() -> Door:
    from ldrt_edge.tensor_file import read_header

    told = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
    }

    def make(rng: Random) -> bytes:
        header = changed_json(rng, told)
        length = rng.choice(EDGES) if rng.random() < 0.1 else len(header)
        return (length & ((1 << 64) - 1)).to_bytes(8, "little") + header + bytes(40)

    return Door(_through_file(read_header, "x.safetensors"), make)


def _manifest() -> Door:
    from ldrt_edge import artifact

    told = {
        "schema": artifact.SCHEMA, "kind": "gguf", "config": {"to": "gguf", "type": "f16"}, "seed": 3,
        "version": "0.1.0",
        "inputs": [{"kind": "merged", "manifest_sha256": "0" * 64}], "git_commit": None, "libraries": {"numpy": "2.4"},
        "files": [{"path": "a/b.txt", "bytes": 3, "sha256": "1" * 64}, {"path": "c", "bytes": 0, "sha256": "2" * 64}],
        "metrics": {"release": {"released": True, "reason": "so"}, "mean_kld": 1e-7},
    }  # fmt: skip

    def opened(path: Path) -> None:
        from ldrt_edge.release import read_verdict

        manifest = artifact.read(path.parent, "gguf")
        with contextlib.suppress(LdrtError):
            read_verdict(manifest.metrics)
        artifact.verify(path.parent, quick=True)

    return Door(_through_file(opened, "manifest.json"), lambda rng: changed_json(rng, told))


def _bundle() -> Door:
    from bundling import write_small

    from ldrt_edge.bundle.container import open_bundle
    from ldrt_edge.bundle.keys import keygen, signer_of

    folder = _scratch()
    key, _ = keygen(folder / "maker")
    seeds = [write_small(folder / "a.ldrt", key).read_bytes(), write_small(folder / "b.ldrt").read_bytes()]

    def opened(path: Path) -> None:
        bundle = open_bundle(path)
        signer_of(bundle.raw, bundle.signature)
        bundle.check()

    def make(rng: Random) -> bytes:
        seed = rng.choice(seeds)
        if rng.random() < 0.3:
            return spliced(rng, seed, rng.choice(seeds))
        if rng.random() < 0.4:  # another statement in the same frame
            size = int(seed[124:135], 8)
            raw = changed_json(rng, json.loads(seed[512 : 512 + size])).ljust(size)
            return seed[:512] + raw[:size] + seed[512 + size :]
        return changed(rng, seed, 1500)

    return Door(_through_file(opened, "x.ldrt"), make)


def _statement() -> Door:
    from ldrt_edge.bundle.statement import SCHEMA, parse

    told = {
        "schema": SCHEMA, "name": "small", "kind": "gguf", "model_sha256": "0" * 64, "report_sha256": "1" * 64,
        "released": True, "verdict": "released: so", "version": "1",
        "metrics": [{"name": "accuracy", "value": 0.5, "ci_low": 0.4, "ci_high": None}],
        "files": [{"path": "models/small/a", "bytes": 3, "sha256": "2" * 64},
                  {"path": "models/small/manifest.json", "bytes": 3, "sha256": "0" * 64}],
    }  # fmt: skip
    return Door(parse, lambda rng: changed_json(rng, told))


def _rows() -> Door:
    from ldrt_edge import artifact
    from ldrt_edge.dataset import Dataset

    told = {
        "id": "1", "image": "images/a.png", "image_sha256": "0" * 64, "language": "en", "task": "colour",
        "turns": [{"role": "user", "text": "What colour?"}, {"role": "assistant", "text": "red"}],
        "answer_type": "open", "source": "drawn", "licence": "CC0-1.0", "group": "g", "kind": "k", "split": "test",
    }  # fmt: skip
    folder = _scratch() / "data"
    with artifact.create(folder, "dataset", {}) as draft:
        (draft.path / "rows.jsonl").write_bytes(b"")
        (draft.path / "images").mkdir()
        (draft.path / "images" / "a.png").write_bytes(b"")
    manifest = json.loads((folder / "manifest.json").read_text())

    def opened(data: bytes) -> None:
        (folder / "rows.jsonl").write_bytes(data)
        manifest["files"][1]["bytes"] = len(data)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        dataset = Dataset(folder)
        for row in dataset:
            assert row.question is not None and row.answer is not None
            dataset.image_path(row)
        dataset.rows("test")

    def make(rng: Random) -> bytes:
        lines = [changed_json(rng, told) if rng.random() < 0.5 else json.dumps(told).encode() for _ in range(3)]
        raw = b"\n".join(lines) + b"\n"
        return changed(rng, raw) if rng.random() < 0.1 else raw

    return Door(opened, make)


def _golden() -> Door:
    from ldrt_edge.golden import read_records

    told = {
        "question": "What is it?", "image": "00.png", "tiles_sha256": "0" * 64, "prompt_ids": [1, 2],
        "reference_ids": [3],
        "reference": "a", "answer_ids": [3, 4], "answer": "a", "margins": [1.5, 0.1],
    }  # fmt: skip

    folder = _scratch()
    (folder / "golden").mkdir()

    def opened(data: bytes) -> None:
        (folder / "golden" / "records.jsonl").write_bytes(data)
        read_records(folder)

    return Door(opened, lambda rng: changed_json(rng, told) + b"\n" + changed_json(rng, told))


def _front() -> Door:
    import tiny

    from ldrt_edge.front import Front, Message

    folder = tiny.build(_scratch() / "model", "llava15", "smollm2")
    front = Front.from_hf(folder)
    front.save(folder)
    told = json.loads((folder / "front.json").read_text())
    tokenizer = front.tokenizer
    templates = [value.encode() for value in tiny._TEMPLATES.values()]

    def opened(data: bytes) -> None:
        import ldrt_edge.front as module

        (folder / "front.json").write_bytes(data)
        read, module.read_tokenizer = module.read_tokenizer, lambda _: tokenizer  # type: ignore[assignment]
        try:
            found = Front.load(folder)
            found.render([Message("user", "Hello"), Message("assistant", "x" * 100), Message("user", "Why?")])
        finally:
            module.read_tokenizer = read

    def make(rng: Random) -> bytes:
        if rng.random() < 0.4:
            return changed_json(rng, told)
        one, other = rng.choice(templates), rng.choice(templates)
        raw = spliced(rng, one, other) if rng.random() < 0.3 else changed(rng, one)
        at = rng.randrange(len(raw) + 1)
        text = raw[:at] + rng.choice(_TEMPLATE_PARTS) + raw[at:] if rng.random() < 0.5 else raw
        return json.dumps(told | {"chat_template": text.decode("utf-8", "replace")}).encode()

    return Door(opened, make)


def _pictures() -> Door:
    import numpy as np
    from PIL import Image

    from ldrt_edge.image import read_image_bytes

    seeds = []
    drawn = np.random.default_rng(0).integers(0, 255, (24, 20, 3), np.uint8)
    for mode, kind, options in (
        ("RGB", "PNG", {}), ("L", "PNG", {}), ("P", "PNG", {}), ("I;16", "PNG", {}), ("RGBA", "PNG", {}),
        ("1", "PNG", {}),
        ("RGB", "JPEG", {}), ("L", "JPEG", {}), ("CMYK", "JPEG", {}), ("RGB", "JPEG", {"progressive": True}),
        ("RGB", "TIFF", {}), ("L", "TIFF", {"compression": "tiff_lzw"}), 
        ("RGB", "TIFF", {"compression": "tiff_deflate"}),
        ("1", "TIFF", {"compression": "group4"}), ("F", "TIFF", {}), ("I;16", "TIFF", {}),
    ):  # fmt: skip
        image = Image.fromarray(drawn)
        image = image.convert("L").convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
        stream = io.BytesIO()
        image.save(stream, kind, **options)  # type: ignore[arg-type]
        seeds.append(stream.getvalue())

    def make(rng: Random) -> bytes:
        seed = rng.choice(seeds)
        if seed.startswith(b"\x89PNG") and rng.random() < 0.8:
            return _changed_png(rng, seed)
        return changed(rng, seed, 300)

    def opened(data: bytes) -> None:
        picture = read_image_bytes(data)
        assert picture.rgb.ndim == 3 and picture.rgb.shape[2] == 3

    return Door(opened, make)


def _changed_png(rng: Random, data: bytes) -> bytes:
    """With chunks changed, doubled, moved or dropped, and their checksums right."""
    chunks, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(rng.choice((1, 1, 2, 4))):
        where = rng.randrange(len(chunks))
        name, content = chunks[where]
        match rng.randrange(6):
            case 0:
                chunks.insert(rng.randrange(len(chunks) + 1), (name, content))
            case 1 if len(chunks) > 1:
                del chunks[where]
            case 2:
                extra = rng.choice(
                    (b"tRNS", b"PLTE", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"iCCP", b"zTXt", b"gAMA", b"tEXt")
                )
                bomb = b"x\0\0" + zlib.compress(bytes(rng.choice((10, 10**6))))
                chunks.insert(where, (extra, rng.choice((bomb, rng.randbytes(rng.choice((0, 4, 26, 400)))))))
            case 3 if name == b"IDAT":
                with contextlib.suppress(zlib.error):
                    chunks[where] = (name, zlib.compress(changed(rng, zlib.decompress(content))))
            case _:
                chunks[where] = (name, changed(rng, content))
    parts = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return data[:8] + b"".join(parts)


def _dicom(names: tuple[str, ...]) -> Door:
    from pydicom.data import get_testdata_file

    from ldrt_edge.dicom import slice_position
    from ldrt_edge.image import read_image_bytes

    seeds = [Path(str(get_testdata_file(name, download=False))).read_bytes() for name in names]
    heads = [_elements(seed) for seed in seeds]

    def make(rng: Random) -> bytes:
        which = rng.randrange(len(seeds))
        data = bytearray(seeds[which])
        if rng.random() < 0.3 or not heads[which]:
            return changed(rng, bytes(data), 2000)
        for _ in range(rng.choice((1, 1, 2, 3))):
            at, value_at, length = rng.choice(heads[which])
            match rng.randrange(5):
                case 0:
                    data[at + 4 : at + 6] = rng.choice(
                        (b"SQ", b"US", b"DS", b"OB", b"UN", b"IS", b"OW", b"FD", b"PN", b"??")
                    )
                case 1:
                    data[at + 6 : at + 8] = (rng.choice(EDGES) & 0xFFFF).to_bytes(2, "little")
                case 2:
                    data[value_at - 4 : value_at] = (rng.choice(EDGES) & 0xFFFFFFFF).to_bytes(4, "little")
                case 3 if length:
                    hostile = rng.choice(
                        (b"0", b"-1", b"1e999", b"99999999", b"NaN", b"\\\\\\", b"\xff\xff\xff\x7f", b"\0\0")
                    )
                    data[value_at : value_at + length] = (hostile * length)[:length]
                case _:
                    span = bytes(data[at : value_at + length])
                    data[at:at] = span
                    break  # what lies behind has moved
        return bytes(data)

    def opened(data: bytes) -> None:
        with contextlib.suppress(LdrtError):
            slice_position(data)
        read_image_bytes(data)

    return Door(opened, make)


def _elements(data: bytes) -> list[tuple[int, int, int]]:
    """Of a little-endian file with explicit types: where elements begin, where their values do, how long these are."""
    found, at = [], 132
    while at + 8 <= len(data):
        kind = data[at + 4 : at + 6]
        if not kind.isalpha():
            return found
        long = kind in (b"OB", b"OW", b"SQ", b"UN", b"UT", b"OF", b"OD")
        value_at = at + (12 if long else 8)
        length = int.from_bytes(data[value_at - 4 : value_at] if long else data[at + 6 : at + 8], "little")
        if length == 0xFFFFFFFF:
            length = 0
        found.append((at, value_at, min(length, 64)))
        at = value_at + length
    return found


def _overlay() -> Door:
    """Dose and structures, read and laid over the slice that they were planned on."""
    from test_overlay import ct, dose, ramp, structures

    from ldrt_edge.image import read_image_bytes
    from ldrt_edge.overlay import lay_over, read_overlay

    slice_ = ct()
    picture = read_image_bytes(slice_)
    seeds = [dose(ramp()), structures(digits=12)]
    numbers = [[found.span() for found in re.finditer(rb"-?\d[\d.]+", seed)] for seed in seeds]

    def make(rng: Random) -> bytes:
        which = rng.randrange(len(seeds))
        data = bytearray(seeds[which])
        for _ in range(rng.choice((1, 1, 2, 5))):
            start, end = rng.choice(numbers[which])
            data[start:end] = rng.choice(_NUMBERS).ljust(end - start)[: end - start]
        return changed(rng, bytes(data)) if rng.random() < 0.4 else bytes(data)

    def opened(data: bytes) -> None:
        lay_over(picture, slice_, [read_overlay(data)])

    return Door(opened, make)


def _jats() -> Door:
    from ldrt_edge.train.data.articles import read_articles

    parts = re.findall(rb"<[^>]*>|[^<]+", _ARTICLE)

    def make(rng: Random) -> bytes:
        """Elements doubled, dropped, moved, nested deep, renamed; texts, attributes and declarations changed."""
        found = list(parts)
        for _ in range(rng.choice((1, 1, 2, 4, 8))):
            at, other = rng.randrange(len(found)), rng.randrange(len(found))
            match rng.randrange(7):
                case 0:
                    del found[at]
                case 1:
                    found[at], found[other] = found[other], found[at]
                case 2:
                    found[at:at] = found[at : at + rng.choice((1, 3, 20))] * rng.choice((1, 2, 50))
                case 3:
                    found[at] = changed(rng, found[at])
                case 4:
                    found.insert(at, rng.choice(_XML_PARTS))
                case 5:
                    name = re.match(rb"</?([\w-]+)", rng.choice(parts))
                    found[at] = re.sub(rb"(?<=[</])[\w-]+", name[1] if name else b"x", found[at], count=1)
                case 6:
                    depth = rng.choice((3, 300, 3000))
                    found[at:at] = [b"<p>"] * depth + [b"</p>"] * depth
        return b"".join(found)

    return Door(read_articles, make)


DOORS: dict[str, Callable[[], Door]] = {
    "gguf": _gguf,
    "safetensors": _safetensors,
    "manifest": _manifest,
    "statement": _statement,
    "bundle": _bundle,
    "rows": _rows,
    "golden": _golden,
    "front": _front,
    "jats": _jats,
    "overlay": _overlay,
    "pictures": _pictures,
    "dicom": lambda: _dicom(("CT_small.dcm", "MR_small.dcm", "rtdose_1frame.dcm", "SC_rgb_small_odd.dcm")),
    "compressed": lambda: _dicom(("MR_small_RLE.dcm", "JPEG2000.dcm", "SC_rgb_jpeg_dcmtk.dcm")),
}
