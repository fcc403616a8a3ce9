"""A conversation as a DICOM Structured Report (Enhanced SR), for archives that keep such: research, not diagnosis.

It belongs to no patient: what the model saw is named by hash, its study is its own, and nothing refers to the study
that the pictures came from. What was asked stands in it as it was typed.

Source: DICOM PS3.3 A.35.2 (Enhanced SR IOD), PS3.16 TID 1001 and 1004 (a device as observer), PS3.3 C.12.1.1.9 (for
research). Questions, answers and hashes have no codes in the standard: ours are in a private coding scheme.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from ldrt_edge import __version__
from ldrt_edge.chat.session import NOTICE, Exchange, Session, Shown
from ldrt_edge.errors import DataError

if TYPE_CHECKING:
    from highdicom.sr import CodedConcept
    from pydicom import Dataset

SCHEME = "99LDRTEDGE"
_TITLE = "Conversation with a model, for research, not for diagnosis"
_ENDS = {"end": "whole", "length": "cut off by length", "stopped": "stopped by the user"}
_UNPRINTABLE = {code: None for code in (*range(0x20), 0x7F) if chr(code) not in "\t\n\r"}


def structured_report(session: Session) -> bytes:
    """The file: a container for each question, with the hashes of its pictures, the answer and what it rests on.

    Raises:
        DataError: nothing was asked yet.
    """
    from highdicom.coding_schemes import CodingSchemeIdentificationItem
    from highdicom.sr import EnhancedSR

    if not session.exchanges:
        raise DataError("nothing was asked yet: there is nothing to report")
    told = [*_observer(session), _text("notice", "Notice", NOTICE)]
    if session.unreleased:
        told.append(_text("unreleased", "Why the model is not released", session.unreleased))
    told += [_exchange(session, exchange) for exchange in session.exchanges]
    report = EnhancedSR(
        evidence=[_nobody()], content=_container("conversation", _TITLE, told, None), series_instance_uid=_uid(),
        series_number=1, sop_instance_uid=_uid(), instance_number=1, manufacturer="ldrt-edge",
        manufacturer_model_name="ldrt-edge", software_versions=__version__, is_complete=True,
        series_description="For research, not for diagnosis", content_qualification="RESEARCH",
        coding_schemes=[CodingSchemeIdentificationItem(SCHEME, name="ldrt-edge", version=__version__)],
    )  # fmt: skip
    del report.CurrentRequestedProcedureEvidenceSequence  # `_nobody`: there is no such file
    report.PatientIdentityRemoved, report.DeidentificationMethod = "YES", "identifiers were never taken in"
    stream = io.BytesIO()
    report.save_as(stream)
    return stream.getvalue()


def _exchange(session: Session, exchange: Exchange) -> Dataset:
    from pydicom.sr.codedict import codes

    sampling, timings = exchange.sampling, exchange.timings
    told = [
        _text("question", "Question", exchange.question),
        *(_picture(shown) for shown in exchange.shown),
        _text("answer", "Answer", exchange.answer),
        _text("ending", "How the answer ended", _ENDS[exchange.finish]),
        _text("sampling", "How the answer was drawn", f"temperature {sampling.temperature:g}, seed {sampling.seed}"),
        _number(_code("ttft", "Time to the first word"), timings.ttft_ms, codes.UCUM.Millisecond),
    ]
    if exchange.probability is not None:
        told.append(_number(codes.DCM.Probability, exchange.probability, codes.UCUM.NoUnits))
    if sure := session.how_sure(exchange):
        told.append(_text("how-sure", "How often answers as sure were right", sure.told))
    return _container("exchange", "Question and answer", told)


def _picture(shown: Shown) -> Dataset:
    origin, (height, width) = shown.origin, shown.image.size
    seen = [origin.modality or origin.format, f"{width}×{height}"]
    if origin.window:
        seen.append("window {:g} / {:g}".format(*origin.window))
    if origin.frames > 1:
        seen.append(f"frame {origin.frame + 1} of {origin.frames}")
    if origin.blacked_out:
        seen.append(f"{origin.blacked_out} lines of text blacked out")
    told = [
        _text("seen-sha256", "SHA-256 of the pixels that the model saw", shown.image.sha256),
        _text("file-sha256", "SHA-256 of the picture's file", origin.sha256),
        _text("seen-as", "How it was shown", ", ".join(seen)),
        *(_text("over-sha256", f"SHA-256 of the {over.modality} over it", over.sha256) for over in origin.overlays),
    ]
    return _container("picture", "Picture that the model saw", told)


def _observer(session: Session) -> list[Dataset]:
    """The program, and as its serial number the hash that identifies the model."""
    from highdicom.sr import DeviceObserverIdentifyingAttributes, ObserverContext
    from pydicom.sr.codedict import codes

    model = session.model.manifest_sha256 if session.model else None
    attributes = DeviceObserverIdentifyingAttributes(
        _uid(), "ldrt-edge", "ldrt-edge", f"ldrt-edge {__version__}, {session.runtime.name}", model
    )
    return list(ObserverContext(codes.DCM.Device, attributes))


def _nobody() -> Dataset:
    """What highdicom takes patient and study from."""
    from pydicom import Dataset
    from pydicom.uid import SecondaryCaptureImageStorage

    made = Dataset()
    made.SOPClassUID, made.SpecificCharacterSet = SecondaryCaptureImageStorage, "ISO_IR 192"
    made.SOPInstanceUID, made.SeriesInstanceUID, made.StudyInstanceUID = _uid(), _uid(), _uid()
    made.PatientID = made.PatientName = made.PatientBirthDate = made.PatientSex = ""
    made.AccessionNumber = made.StudyID = made.StudyDate = made.StudyTime = ""
    return made


def _text(value: str, meaning: str, text: str) -> Dataset:
    from highdicom.sr import TextContentItem

    return TextContentItem(_code(value, meaning), text.translate(_UNPRINTABLE), relationship_type="CONTAINS")


def _number(name: CodedConcept, value: float, unit: CodedConcept) -> Dataset:
    from highdicom.sr import NumContentItem

    return NumContentItem(name, float(f"{value:.6g}"), unit, relationship_type="CONTAINS")


def _container(value: str, meaning: str, told: list[Dataset], nested: str | None = "CONTAINS") -> Dataset:
    from highdicom.sr import ContainerContentItem
    from pydicom import Sequence

    made = ContainerContentItem(_code(value, meaning), is_content_continuous=False, relationship_type=nested)
    made.ContentSequence = Sequence(told)
    return made


def _code(value: str, meaning: str) -> CodedConcept:
    from highdicom.sr import CodedConcept

    return CodedConcept(value, SCHEME, meaning)


def _uid() -> str:
    """Of a random UUID, under which nothing of this machine can be found."""
    from pydicom.uid import generate_uid

    return str(generate_uid(prefix=None))
