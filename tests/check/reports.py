"""Reports for the tests of what is drawn from them."""

from __future__ import annotations

from xdonnx.report import (
    Answer,
    Drop,
    Fidelity,
    Figures,
    FileInfo,
    Files,
    GateResult,
    InterfaceCheck,
    Latency,
    LayerResult,
    OutputError,
    Report,
    Tool,
    WorstShot,
)

# One black pixel.
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


def latency(median: float) -> Latency:
    return Latency(
        median=median,
        q1=0.9 * median,
        q3=1.1 * median,
        provider="CPUExecutionProvider",
        threads=2,
        runs=50,
        batch=1,
    )


def layer(number: int, error: float | None) -> LayerResult:
    return LayerResult(
        layer=f"conv|{number}",
        op="Conv",
        kept=4,
        units=8,
        params_before=100,
        params_after=50,
        macs_before=1000,
        macs_after=None,
        objective_before=error,
        objective_after=error,
        seconds=0.5,
        note="",
    )


def full_report(**changes) -> Report:
    facts = {
        "status": "rejected",
        "exit_code": 3,
        "reasons": ("max_drop: 2.00 points, allowed at most 1 points",),
        "started": "2026-11-21T08:00:00+00:00",
        "seconds": 12.3,
        "tool": Tool(version="0.1.0", onnx="1", onnxruntime="2", torch=None),
        "command": "xdonnx compress 'my model.onnx' -o out.onnx",
        "job": {"keep": 0.5, "method": ["cross"], "shots": None},
        "seed": 3,
        "device": "cpu",
        "files": Files(teacher=FileInfo(path="a.onnx", sha256="ab", bytes=2000)),
        "teacher": Figures(bytes=2000, params=400, nonzero=399, macs=5000, latency_ms=latency(2.0)),
        "student": Figures(bytes=1000, params=200, nonzero=200, macs=2500, latency_ms=latency(1.0)),
        "fidelity": Fidelity(
            samples=50,
            held_out=True,
            top1_agreement=94.0,
            accuracy_teacher=90.0,
            accuracy_student=88.0,
            drop=Drop(
                value=2.0,
                low=-3.1,
                high=8.2,
                confidence=0.95,
                of="accuracy",
                method="tango",
                lost=2,
                gained=1,
            ),
            smallest_drop=8.0,
            worst=(shot(7),),
            outputs=(OutputError(name="logits", relative_l2=0.12, max_abs=1.5, cosine=0.99),),
        ),
        "gates": (
            GateResult(
                name="max_drop",
                value=2.0,
                bound=2.0,
                limit=1.0,
                unit="points",
                level="fail",
                passed=False,
            ),
        ),
        "layers": tuple(layer(number, error) for number, error in enumerate([0.1, None, 0.7, 0.3, 0.2, 0.6, 0.5])),
        "interface": InterfaceCheck(opset=("opset 18, the teacher has 17",)),
        "warnings": ("50 held-out samples can show a drop of 8.00 points at best",),
    }
    return Report(**facts | changes)


def gate(name: str = "max_drop", **changes) -> GateResult:
    facts = {"value": 2.0, "bound": 2.0, "limit": 1.0, "unit": "points", "level": "fail", "passed": False}
    return GateResult(name=name, **facts | changes)


def shot(row: int, **changes) -> WorstShot:
    facts = {
        "sample": f"cat/{row}.png",
        "label": 0,
        "label_name": "cat",
        "teacher": Answer(top=0, name="cat", score=4.5),
        "student": Answer(top=1, name="dog", score=2.5),
        "relative_l2": 0.5,
        "thumbnail": PIXEL,
    }
    return WorstShot(row=row, **facts | changes)
