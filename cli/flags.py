"""The flags, in the groups that commands share, and how their texts become what the library takes.

Nothing heavy is imported with this module: `--help` has to be instant.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

if TYPE_CHECKING:
    from xdonnx.gate import Gate
    from xdonnx.images import Preprocess


def panel(title: str) -> Callable[..., Any]:
    """Return what makes the options of one panel of the help: `(name, metavar, help, *short names)`."""

    def option(name: str, metavar: str, text: str, *short: str, **other: Any) -> Any:
        return Option(*short, name, metavar=metavar, help=text, rich_help_panel=title, **other)

    return option


# A switch takes no value, and an empty metavar says so.
SWITCH = ""

data = panel("Data")
pixels = panel("Preprocessing")
target = panel("Target (one of)")
method = panel("Method")
limit = panel("Gate")
output = panel("Output")
running = panel("Run")


# Of compress alone: what another command made, or another tool, and what only its gate can end.
PLAN = target("--plan", "FILE", "What xdonnx plan wrote, edited or not.")
SMALLEST = target(
    "--smallest",
    SWITCH,
    "As few MACs as the gate allows, found by halving: some six students are made and judged. Wants --max-drop or "
    "--max-error.",
)
_STUDENT = (
    "Refit this student, which another tool pruned or decomposed; nothing more goes. By --method cross (effort "
    "balanced or fast) or fskd."
)
STUDENT = target("--student", "FILE", _STUDENT)
MATCH = method("--match", "FILE", "Of --student: what xdonnx match wrote, edited or not. Default: found anew.")


def fraction(text: str) -> float:
    """Return a fraction given as 0.5 or as 50%."""
    number = re.fullmatch(r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*(%?)\s*", str(text))
    if number is None:
        raise typer.BadParameter(f"'{text}' is no number. Write 50% or 0.5.")
    # As a decimal, since 99.9 / 100 is not 0.999.
    value = float(f"{number[1]}e-2" if number[2] else number[1])
    if value > 1 and not number[2]:
        meant = f"{text}%" if 2 <= value <= 100 else "50%"
        raise typer.BadParameter(
            f"{text} is above 1. Write a fraction such as 0.5, or per cent with its sign: {meant}."
        )
    return value


def points(text: str) -> float:
    """Return points, with or without a sign of per cent: both are meant the same."""
    try:
        return float(str(text).strip().removesuffix("%"))
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no number of points such as 1 or 0.5.") from None


def multiple(text: str) -> int | None:
    """Return a number of channels, None for 'auto'."""
    if str(text) == "auto":
        return None
    if not re.fullmatch(r"[+-]?\d+", str(text)):
        raise typer.BadParameter(f"'{text}' is neither auto nor a number of channels such as 8.")
    return int(text)


def sized(text: str) -> str:
    """Return the size of a file as it is written: 10MB or 40%."""
    return _amount(text, "size")


def timed(text: str) -> str:
    """Return a latency as it is written: 5ms or 70%."""
    return _amount(text, "latency")


def _amount(text: str, kind: str) -> str:
    from xdonnx.amounts import amount_of

    amount_of(text, kind)
    return text


def numbers(text: str | None, flag: str) -> tuple[float, ...] | None:
    """Return comma-separated numbers."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no list of numbers such as 0.5,0.5,0.5.", param_hint=flag) from None


_SHOTS = (
    "Samples: a folder of images (sub-folders are classes) or of ONNX test_data_set_*, .npz, .npy, or a text file of "
    "image paths. NAME=PATH, "
    "repeated, for several inputs."
)
_HOLDOUT = (
    "The samples that judge: a fraction of all, or a PATH to others. Default: 0.2 for compress; all are for verify."
)
_PRESET = (
    "imagenet: x/255, its mean and std, resized and cropped. unit: x/255. raw: 0-255. tf: x/127.5 - 1. caffe: BGR "
    "less its mean."
)
_SHAPE = "Shape of an input whose size the graph leaves free. Repeat for several inputs."
_KIND = (
    "channel, the default: smaller and faster. element: single weights; a smaller file, no faster. n:m, such as 2:4."
)
_ROUND = (
    "Keep channels in multiples of N. auto, the default: of 8 or 4 where layers are wide; exactly F with --keep; what "
    "proves fast on this machine with --latency."
)
_SIZE = "The student's file, at most: so many bytes (B, kB, MB, GB, KiB, MiB), or 40% of the teacher's."
_LATENCY = (
    "Median time of one run in onnxruntime on this machine and --device, at most, for one sample: 5ms, or 70% of the "
    "teacher's. Layers are timed at several widths, and whole students until the target is met."
)
_CONNECTION = "auto, soft, cross, correction, imitation or regression: which input each network reads."
_ALLOCATION = (
    "auto, measured or uniform: whether layers lose by their error curves or all the same fraction. auto: measured "
    "but with --keep, unless the effort is fast or paper."
)
_STEPS = "Of --method tune, squeeze, bp and fitnet. Default: by the effort and the size of the network."
_ADVERSARIAL = "Of --method squeeze: an adversary has a say, as by default. Without it: --no-adversarial."
_VIEWS = "Bring few images to N rows by mirrored, shifted and mixed views; 0 makes none. Default: 128."
_POOL = (
    "Unlabelled images, related to the task or not, as --shots takes them: methods cross, tune, squeeze and "
    "fitnet learn from them too."
)
_DRAW = "preferential or uniform: whether images related to the teacher's task are drawn from the pool more often."
_DROP = "Points of accuracy lost, at most; of agreement with the teacher where nothing is labelled."
_SURE = "Judge the far end of the interval at this confidence, not the measured value: 95%."
_WARN = (
    "This gate only warns: max-drop, or of those that compress always judges smaller, not-slower, removed. Repeat for "
    "others."
)
_STRICT = "Judge also what compress always does: the file smaller, not slower beyond the noise, weights removed."
_JSON = "The report as JSON: - is stdout, and the tables go to stderr."


@dataclass(frozen=True)
class Data:
    """Which samples fit and which judge."""

    shots: Annotated[list[str] | None, data("--shots", "PATH", _SHOTS)] = None
    labels: Annotated[Path | None, data("--labels", "FILE", "Classes: one a line, 'name class' lines, or .npy.")] = None
    per_class: Annotated[int | None, data("--per-class", "K", "Draw K labelled samples of each class.")] = None
    max_shots: Annotated[int | None, data("--max-shots", "N", "Draw N samples in all.")] = None
    holdout: Annotated[str | None, data("--holdout", "F|PATH", _HOLDOUT)] = None
    skip_bad: Annotated[bool, data("--skip-bad", SWITCH, "Leave out unreadable files; the report names them.")] = False
    synthetic_shots: Annotated[int | None, data("--synthetic-shots", "N", "Random noise, just to try things out.")] = (
        None
    )

    def held_out(self, otherwise: str) -> str:
        """Return the hold-out as a plain fraction or a path."""
        given = (self.holdout or otherwise).strip()
        return f"{fraction(given):g}" if given.endswith("%") else given


@dataclass(frozen=True)
class Pixels:
    """How pixels become numbers."""

    preset: Annotated[str, pixels("--preset", "NAME", _PRESET)] = "imagenet"
    mean: Annotated[str | None, pixels("--mean", "A,B,C", "Replaces the preset's.")] = None
    std: Annotated[str | None, pixels("--std", "A,B,C", "Replaces the preset's.")] = None
    scale: Annotated[float | None, pixels("--scale", "X", "What pixels are divided by first.")] = None
    color: Annotated[str | None, pixels("--color", "ORDER", "rgb, bgr or gray: what the graph takes.")] = None
    layout: Annotated[str, pixels("--layout", "ORDER", "auto, nchw or nhwc: how arrays lie.")] = "auto"
    resize: Annotated[int | None, pixels("--resize", "PX", "Shorter side before the crop.")] = None
    crop: Annotated[int | None, pixels("--crop", "PX", "Side of the crop, where the graph's is free.")] = None

    def preprocess(self) -> Preprocess:
        """Return them as the library takes them; raises JobError for values that make no sense."""
        from xdonnx.images import Preprocess

        return Preprocess(**{**vars(self), "mean": numbers(self.mean, "--mean"), "std": numbers(self.std, "--std")})


@dataclass(frozen=True)
class Sizes:
    """Input sizes that a graph leaves free."""

    input_shape: Annotated[list[str] | None, pixels("--input-shape", "NAME:1x3x224x224", _SHAPE)] = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return {input: shape}."""
        found: dict[str, tuple[int, ...]] = {}
        for text in self.input_shape or ():
            # A name may hold colons itself, as in TensorFlow's 'image:0', so the last one counts.
            name, _, shape = text.rpartition(":")
            if not name or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
                what = f"'{text}' is no NAME:SHAPE such as image:1x3x224x224."
                raise typer.BadParameter(what, param_hint="--input-shape")
            found[name] = tuple(int(size) for size in shape.split("x"))
        return found


@dataclass(frozen=True)
class Target:
    """What may stay, and where."""

    macs: Annotated[
        float | None,
        target("--macs", "P", "MACs of the student, at most: 50% or 0.5. The default target, at 50%.", parser=fraction),
    ] = None
    params: Annotated[float | None, target("--params", "P", "Weights of the student, at most.", parser=fraction)] = None
    size: Annotated[str | None, target("--size", "10MB|P", _SIZE, parser=sized)] = None
    latency: Annotated[str | None, target("--latency", "5ms|P", _LATENCY, parser=timed)] = None
    keep: Annotated[
        float | None,
        target("--keep", "F", "Units kept in each layer that may lose some: above 0, below 1.", parser=fraction),
    ] = None
    structure: Annotated[str | None, method("--structure", "KIND", _KIND)] = None
    include: Annotated[list[str] | None, method("--include", "PATTERN", "Only these layers, as 'stage3*'.")] = None
    exclude: Annotated[list[str] | None, method("--exclude", "PATTERN", "All layers but these.")] = None
    round_to: Annotated[int | None, method("--round-to", "N|auto", _ROUND, parser=multiple)] = None
    residual: Annotated[bool, method("--residual", SWITCH, "Also remove channels that several layers add into.")] = (
        False
    )
    allocation: Annotated[str, target("--allocation", "HOW", _ALLOCATION)] = "auto"


@dataclass(frozen=True)
class Recipe:
    """How it is done."""

    method: Annotated[
        list[str] | None, method("--method", "NAME", "See xdonnx methods; repeat to chain. Default: cross.")
    ] = None
    connection: Annotated[str, method("--connection", "NAME", _CONNECTION)] = "auto"
    mu: Annotated[float | None, method("--mu", "X", "Of --connection cross: the share of correction.")] = None
    alpha: Annotated[float | None, method("--alpha", "X", "Of --connection soft: the teacher's own input.")] = None
    beta: Annotated[float | None, method("--beta", "X", "Of --connection soft: the student's own input.")] = None
    solver: Annotated[str, method("--solver", "NAME", "auto, pgd, admm or greedy.")] = "auto"
    ridge: Annotated[float | None, method("--ridge", "X", "Pull toward the teacher's weights.")] = None
    views: Annotated[int | None, method("--views", "N", _VIEWS, min=0)] = None
    steps: Annotated[int | None, method("--steps", "N", _STEPS, min=1)] = None
    adversarial: Annotated[bool, method("--adversarial", SWITCH, _ADVERSARIAL, show_default=False)] = True
    pool: Annotated[list[str] | None, method("--pool", "PATH", _POOL)] = None
    pool_draw: Annotated[str, method("--pool-draw", "HOW", _DRAW)] = "preferential"
    preset_effort: Annotated[str, method("--preset-effort", "NAME", "fast, balanced, best or paper.")] = "balanced"


@dataclass(frozen=True)
class Limits:
    """What the student must keep to pass."""

    max_drop: Annotated[float | None, limit("--max-drop", "POINTS", _DROP, parser=points)] = None
    max_error: Annotated[float | None, limit("--max-error", "X", "Relative L2 error of any output, at most.")] = None
    min_shrink: Annotated[
        float | None, limit("--min-shrink", "P", "Bytes gone, at least: 10% or 0.1.", parser=fraction)
    ] = None
    max_latency_ratio: Annotated[
        float | None, limit("--max-latency-ratio", "X", "Median latency over the teacher's, at most.")
    ] = None
    confidence: Annotated[float | None, limit("--confidence", "P", _SURE, parser=fraction)] = None
    warn_only: Annotated[list[str] | None, limit("--warn-only", "GATE", _WARN)] = None

    def gate(self, *, strict: bool = False) -> Gate:
        """Return them as the library takes them; raises JobError for limits that are none."""
        from xdonnx.gate import Gate

        names = tuple(name.replace("-", "_") for name in self.warn_only or ())
        return Gate(**{**vars(self), "warn_only": names}, strict=strict)


STRICT = Annotated[bool, limit("--strict", SWITCH, _STRICT)]


@dataclass(frozen=True)
class Talk:
    """How much is said while it runs, and where the report goes besides."""

    json: Annotated[str | None, output("--json", "-|FILE", _JSON)] = None
    quiet: Annotated[bool, running("--quiet", SWITCH, "The verdict only, and errors.", "-q")] = False
    verbose: Annotated[bool, running("--verbose", SWITCH, "Every step as a line on stderr; tracebacks.", "-v")] = False
    no_progress: Annotated[bool, running("--no-progress", SWITCH, "No progress bar.")] = False
