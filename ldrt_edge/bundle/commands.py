"""The bundle's commands, from packing to a kit; and inspect, which looks and trusts nobody."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ldrt_edge.options import PATH, json_option, show_artifact

if TYPE_CHECKING:
    from ldrt_edge.bundle.container import Opened
    from ldrt_edge.bundle.keys import Signer

trust_once_option = click.option("--trust-once", is_flag=True, help="Open a bundle that nobody you trust has signed.")


class _PackFirst(click.Group):
    """`bundle EDGE ...` packs: what is no command of the group is an export."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the command `pack` before an export."""
        known = not args or args[0] in self.commands or args[0] in ctx.help_option_names
        return super().parse_args(ctx, args if known else ["pack", *args])


@click.group(cls=_PackFirst)
def bundle() -> None:
    """One file with a model and what was measured of it: pack it, sign it, verify it, install it without a network.

    `ldrt-edge bundle EDGE --report REPORT --out NAME.ldrt` packs.
    """


@bundle.command()
@click.argument("edge", type=PATH)
@click.option("--report", required=True, type=PATH, help="Bench's report about EDGE, with a reference.")
@click.option("--out", required=True, type=PATH, help="NAME.ldrt")
@click.option("--base", help="The base model, for the card and the bill of materials.")
@click.option("--licence", help="Of the model: an SPDX identifier.")
@click.option("--max-loss", default=1.0, show_default=True, help="Percentage points that it may have lost.")
@click.option("--unreleased", is_flag=True, help="Pack a model that lost more, or whose loss is not known.")
@json_option
def pack(edge: Path, report: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Pack an export and its report. The report's pictures and answers go with it: mind whose they are."""
    from ldrt_edge.bundle.pack import pack as run

    _show(run(edge, report, out, **options), as_json)


@bundle.command()
@click.argument("name", type=PATH)
@click.option("--passphrase", prompt="Passphrase (empty for none)", default="", hide_input=True, show_default=False,
              confirmation_prompt=True)  # fmt: skip
@json_option
def keygen(name: Path, passphrase: str, as_json: bool) -> None:
    """Make a key pair, NAME.key (keep it secret) and NAME.pub (give it to those who shall trust you)."""
    from ldrt_edge.bundle.keys import keygen as run

    made = [str(path) for path in run(name, passphrase or None)]
    click.echo(json.dumps({"paths": made}) if as_json else "\n".join(made))


@bundle.command()
@click.argument("public_key", type=PATH, metavar="NAME.pub|AUTHORITY.pem")
@json_option
def trust(public_key: Path, as_json: bool) -> None:
    """Trust a key, or an authority's certificate and all whom it lets sign code: what they sign will open.

    Compare what is shown with its owner's.
    """
    from ldrt_edge.bundle.keys import trust as run
    from ldrt_edge.bundle.keys import trusted_file

    signer = run(public_key)
    kept = trusted_file(signer)
    told = {"path": str(kept), **asdict(signer)}
    click.echo(json.dumps(told) if as_json else f"{signer.told}\n{kept}")


@bundle.command()
@click.argument("path", type=PATH, metavar="NAME.ldrt")
@click.option("--key", required=True, type=PATH, help="NAME.key")
@click.option("--certificate", type=PATH, help="The key's, and those up to its authority's, in PEM.")
@json_option
def sign(path: Path, key: Path, certificate: Path | None, as_json: bool) -> None:
    """Sign a bundle where it lies, after holding all of it against its statement."""
    from ldrt_edge.bundle import keys
    from ldrt_edge.bundle.container import open_bundle, replace_signature

    passphrase = click.prompt("Passphrase", hide_input=True) if keys.is_encrypted(key) else None
    opened = open_bundle(path)
    opened.check()
    replace_signature(opened, keys.sign(opened.raw, key, passphrase, certificate))
    _show(path, as_json)


@bundle.command()
@click.argument("path", type=PATH, metavar="BUNDLE")
@trust_once_option
@json_option
def verify(path: Path, trust_once: bool, as_json: bool) -> None:
    """Check signature, trust and every byte of a bundle, packed or installed."""
    from ldrt_edge.bundle.open import accept, check_whole, open_any

    opened = open_any(path)
    accept(opened, trust_once)
    check_whole(opened)
    _show(path, as_json)


@bundle.command()
@click.argument("path", type=PATH, metavar="NAME.ldrt")
@click.option("--out", type=PATH, help="Default: in your own folder, where chat finds it again.")
@trust_once_option
@json_option
def install(path: Path, out: Path | None, trust_once: bool, as_json: bool) -> None:
    """Verify a bundle, unpack it, and ask the model its golden questions; no network is used."""
    from ldrt_edge.bundle.open import install as run

    folder = run(path, out, trust_once)
    click.echo(json.dumps({"path": str(folder)}) if as_json else folder)


@bundle.command()
@click.argument("path", type=PATH, metavar="[NAME.ldrt]", required=False)
@click.option("--platform", required=True, help="linux-x86_64, macos-arm64 or windows-x86_64.")
@click.option("--out", required=True, type=PATH, help="The kit's folder.")
@click.option("--python", help="Python's version there, as 3.11. Default: the one that runs here.")
@click.option("--wheels", type=PATH, help="A folder with wheels of your own, such as llama.cpp's for that platform.")
@json_option
def kit(path: Path | None, out: Path, as_json: bool, **options: Any) -> None:
    """Collect what a machine without a network needs: wheels, a signed bundle, an installer, a page to print.

    Tell whoever installs it the digest, by another way than you give the kit.
    """
    from ldrt_edge import artifact
    from ldrt_edge.bundle.kit import DIGEST
    from ldrt_edge.bundle.kit import kit as run

    made = run(out, bundle=path, **options)
    if not as_json:
        click.echo(f"digest {artifact.read(made).metrics[DIGEST]}")
    show_artifact(made, as_json)


@click.command()
@click.argument("path", type=PATH, metavar="BUNDLE")
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """What a bundle says of itself, and who signed that. Reads its statement only; nothing is checked or loaded."""
    _show(path, as_json, whole=True)


def _show(path: Path, as_json: bool, whole: bool = False) -> None:
    from ldrt_edge.bundle.keys import signer_of
    from ldrt_edge.bundle.open import open_any

    opened = open_any(path)
    signer = signer_of(opened.raw, opened.signature)
    if as_json:
        told = {"path": str(path), "digest": opened.digest, "signer": asdict(signer) if signer else None}
        click.echo(json.dumps(told | {"statement": asdict(opened.statement)}, ensure_ascii=False))
    else:
        click.echo("\n".join([*_head(opened, signer), *(_contents(opened) if whole else [str(path)])]))


def _head(opened: Opened, signer: Signer | None) -> list[str]:
    told = opened.statement
    who = signer.told if signer else "nobody"
    return [f"{told.name} ({told.kind})", f"digest     {opened.digest}", f"signed by  {who}", told.verdict]


def _contents(opened: Opened) -> list[str]:
    told = opened.statement
    intervals = [
        "" if m.ci_low is None or m.ci_high is None else f"  ({m.ci_low:.3g} to {m.ci_high:.3g})" for m in told.metrics
    ]
    measured = [f"  {m.value:<10.3g}  {m.name}{i}" for m, i in zip(told.metrics, intervals, strict=True)]
    files = [f"  {entry.bytes:>14,}  {entry.path}" for entry in told.files]
    return ["measured (95% interval)", *measured, "files (bytes)", *files]
