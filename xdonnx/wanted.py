"""What is wanted of a compression: every field is a flag, and what makes no sense together is refused here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from xdonnx.amounts import Amount, amount_of, fraction_of, settled
from xdonnx.budget import KINDS, Budget, pattern_of
from xdonnx.draw import check_seed
from xdonnx.errors import JobError, did_you_mean
from xdonnx.gate import Gate
from xdonnx.images import Preprocess
from xdonnx.machine import parsed_bytes
from xdonnx.methods import METHODS, REFITTING, REFITTING_EFFORTS, REMOVING, UNFITTED, make
from xdonnx.mistakes import mistake
from xdonnx.planfile import read_planfile
from xdonnx.pool import check_draw
from xdonnx.samples import Request

DEFAULT_TARGET = ("macs", 0.5)
ALLOCATIONS = ("auto", "measured", "uniform")


class Job(BaseModel):
    """What is wanted. Every field is a flag of `xdonnx compress`, under the same name."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    model: Path
    out: Path
    shots: tuple[str, ...] = ()
    labels: Path | None = None
    per_class: int | None = None
    max_shots: int | None = None
    holdout: str = "0.2"
    skip_bad: bool = False
    synthetic_shots: int | None = None
    preprocess: Preprocess = Preprocess()
    input_shape: Mapping[str, tuple[int, ...]] = {}
    pool: tuple[str, ...] = ()
    pool_draw: str = "preferential"

    keep: float | None = None
    macs: float | None = None
    params: float | None = None
    size: float | str | None = None
    latency: float | str | None = None
    smallest: bool = False
    plan: Path | None = None
    student: Path | None = None
    match: Path | None = None
    structure: str = "channel"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    round_to: int | None = None
    residual: bool = False
    allocation: str = "auto"

    method: tuple[str, ...] = Field(("cross",), min_length=1)
    connection: str = "auto"
    mu: float | None = None
    alpha: float | None = None
    beta: float | None = None
    solver: str = "auto"
    ridge: float | None = None
    views: int | None = None
    steps: int | None = None
    adversarial: bool = True
    preset_effort: str = "balanced"

    gate: Gate = Gate()
    force: bool = False
    external_data: str = "auto"
    device: str = "auto"
    seed: int = 0
    resume: bool = False
    memory: int | None = None

    @field_validator("shots", "pool", "method", "include", "exclude", mode="before")
    @classmethod
    def _one_or_many(cls, given: Any) -> Any:
        return (str(given),) if isinstance(given, (str, Path)) else given

    @field_validator("holdout", mode="before")
    @classmethod
    def _fraction_or_path(cls, given: Any) -> Any:
        return str(given) if isinstance(given, (float, Path)) else given

    @field_validator("memory", mode="before")
    @classmethod
    def _bytes(cls, given: Any) -> Any:
        return given if given is None else parsed_bytes(given)

    @field_validator("keep", "macs", "params", mode="before")
    @classmethod
    def _share(cls, given: Any) -> Any:
        return fraction_of(given)

    @field_validator("seed")
    @classmethod
    def _seed(cls, given: int) -> int:
        return check_seed(given)

    @field_validator("size", "latency", mode="before")
    @classmethod
    def _amount(cls, given: Any, info: ValidationInfo) -> Any:
        return given if given is None else settled(given, str(info.field_name))

    @model_validator(mode="wrap")
    @classmethod
    def _checked(cls, given: Any, handler: Any) -> Any:
        """Take the structure from the plan where one is given; tell what is wrong in our words."""
        if isinstance(given, Mapping) and isinstance(given.get("plan"), (str, Path)):
            structure = read_planfile(given["plan"]).structure
            if given.get("structure", structure) != structure:
                raise JobError(
                    f"--structure is {given['structure']}, and '{given['plan']}' has structure {structure}.\n"
                    "  Leave --structure out."
                )
            given = {**given, "structure": structure}
        try:
            return handler(given)
        except ValidationError as error:
            raise mistake(error, cls.model_fields) from None

    def budget(self) -> Budget:
        """Return the target, of kind 'plan' where a file says what stays and 'smallest' where the gate does.

        Raises JobError when several are given.
        """
        given = {kind: getattr(self, kind) for kind in (*KINDS, "plan") if getattr(self, kind) is not None}
        given |= {"smallest": 1.0} if self.smallest else {}
        if self.student is not None:
            self._check_student(given)
            return Budget("student", 1.0, self.structure)
        if self.match is not None:
            raise JobError(
                "--match says how a given student is matched, and there is none.\n  Pass --student FILE too."
            )
        if len(given) > 1:
            flags = " and ".join(f"--{kind}" for kind in given)
            raise JobError(f"{flags} are both given.\n  Give one target.")
        if self.plan is not None:
            choices = {name: getattr(self, name) for name in ("include", "exclude", "round_to", "residual")}
            choices["allocation"] = self.allocation != "auto"
            for name in (name for name, value in choices.items() if value):
                flag = f"--{name.replace('_', '-')}"
                raise JobError(f"{flag} has no say where --plan is given.\n  Leave it out, or pass it to xdonnx plan.")
            return Budget("plan", 1.0, self.structure)
        pattern = pattern_of(self.structure)
        if pattern and given:
            raise JobError(
                f"--structure {self.structure} keeps what its pattern says.\n  Leave --{next(iter(given))} out."
            )
        if not given and not pattern and self.structure != "channel":
            raise JobError(f"--structure {self.structure} needs a target.\n  Pass --keep 0.1 or --params 30%.")
        if self.latency is not None and self.structure != "channel":
            raise JobError(
                f"--latency does not go with --structure {self.structure}: zero weights are multiplied all the same.\n"
                "  Use --keep, --params or --size, or --structure channel."
            )
        kind, amount = next(iter(given.items())) if given else (("keep", 0.5) if pattern else DEFAULT_TARGET)
        if self.smallest:
            check_smallest(self.gate)
        found = amount_of(amount, kind) if kind in ("size", "latency") else Amount(amount)
        return Budget(
            kind, found.number, self.structure, self.include, self.exclude, self.round_to, self.residual, found.unit
        )

    def _check_student(self, targets: Mapping[str, Any]) -> None:
        """Raise JobError for what says how much goes, or which: nothing does from a given student."""
        choices = {**targets, **{name: getattr(self, name) for name in ("include", "exclude", "round_to", "residual")}}
        if self.pool:
            raise JobError(
                "--pool does not go with --student: a given student is refitted on the samples alone.\n"
                "  Leave one of the two out."
            )
        choices |= {"structure": self.structure != "channel", "allocation": self.allocation != "auto"}
        for name in (name for name, value in choices.items() if value):
            raise JobError(
                f"--{name.replace('_', '-')} has no say where --student is given: nothing more is removed from it.\n"
                "  Leave one of the two out."
            )

    def _check_refitting(self, names: Sequence[str]) -> None:
        """Raise JobError for methods and options that cannot refit a given student."""
        for name in names:
            if name not in REFITTING:
                raise JobError(
                    f"--method {name} does not refit a given --student.\n  Those that do: {', '.join(REFITTING)}."
                )
        if self.preset_effort not in REFITTING_EFFORTS:
            raise JobError(
                f"--preset-effort {self.preset_effort} does not go with --student.\n"
                f"  Those that do: {', '.join(REFITTING_EFFORTS)}."
            )
        if self.solver != "auto":
            raise JobError("--solver chooses what goes, and nothing goes from a given --student.\n  Leave it out.")

    def asked(self) -> Request:
        """Return which samples are wanted."""
        return Request(**{field.name: getattr(self, field.name) for field in fields(Request)})

    def target(self) -> str:
        """Return the target in a few words."""
        budget = self.budget()
        if self.student is not None:
            return f"{budget.structure} student {self.student.name}"
        if self.plan is not None:
            return f"{budget.structure} plan {self.plan.name}"
        amount = getattr(self, budget.kind) if budget.unit else f"{budget.amount:g}"
        return f"{budget.structure} {budget.kind}" + ("" if self.smallest else f" {amount}")

    def at(self, share: float) -> Job:
        """Return the job that asks for this share outright: one of those that `smallest` tries."""
        return self.model_copy(update={"smallest": False, "macs" if self.structure == "channel" else "params": share})

    def measured(self) -> bool:
        """Whether error curves decide how much each layer loses; raises JobError where they cannot."""
        if self.allocation not in ALLOCATIONS:
            near = did_you_mean(self.allocation, ALLOCATIONS)
            raise JobError(f"unknown --allocation '{self.allocation}'.{near}\n  Choices: {', '.join(ALLOCATIONS)}.")
        fits = self.structure == "channel" and self.budget().kind not in ("keep", "plan", "student")
        if self.allocation == "measured" and not fits:
            raise JobError(
                "--allocation measured splits a target over the whole network between channels.\n"
                "  Pass --macs, --params, --size, --latency or --smallest with --structure channel, or leave it out."
            )
        asked = self.allocation == "measured"
        return fits and (asked or (self.allocation == "auto" and self.preset_effort not in ("fast", "paper")))

    def methods(self) -> list[Any]:
        """Return the methods with their options; raises JobError for combinations that make no sense."""
        own = {"connection", "mu", "alpha", "beta", "solver", "ridge", "views", "steps", "adversarial"}
        options = self.model_dump(include=own)
        options["effort"] = self.preset_effort
        names = self.method
        if self.student is not None:
            self._check_refitting(names)
        if self.preset_effort == "best" and names == ("cross",):
            names = ("cross", "tune")  # the best accuracy comes with a last stage over all layers
        made = [make(name, options) for name in names]
        if getattr(made[0], "follows", False):
            raise JobError(
                f"--method {names[0]} removes nothing: it trains what another method left.\n"
                f"  Put one before it: --method cross --method {names[0]}."
            )
        if self.student is None:
            _check_chain(names)
        defaults = {"connection": "auto", "solver": "auto", "effort": "balanced", "adversarial": True}
        for name, value in options.items():
            if value != defaults.get(name) and not any(hasattr(method, name) for method in made):
                flag = {"effort": "preset-effort", "adversarial": "no-adversarial"}.get(name, name)
                instead = ", or add --method squeeze" if name == "adversarial" else ""
                raise JobError(
                    f"--{flag} is no option of --method {' or '.join(self.method)}.\n  Leave it out{instead}."
                )
        check_draw(self.pool_draw)
        if not self.pool and self.pool_draw != "preferential":
            raise JobError(f"--pool-draw {self.pool_draw} says how images are drawn from --pool.\n  Pass --pool PATH.")
        if self.pool and not any(getattr(method, "pools", False) for method in made):
            raise JobError(
                f"--pool is of no use to --method {' or '.join(self.method)}"
                f"{' with --preset-effort paper' if self.preset_effort == 'paper' else ''}.\n"
                "  Leave it out, or use --method cross --method tune."
            )
        for method in made:
            method.check(self.structure)
        return made


def _check_chain(names: Sequence[str]) -> None:
    """Raise JobError where a method would choose anew what goes, and so undo or add to what others did before it."""
    for before, name in pairwise(names):
        if name in REMOVING and before in METHODS and before not in UNFITTED:
            raise JobError(
                f"--method {name} decides what goes and starts from the teacher's weights: behind {before} it would "
                "undo what that fitted.\n  Put it first, or leave one of the two out."
            )


def check_smallest(gate: Gate) -> None:
    """Raise JobError unless a gate says how bad a student may be: nothing else ends the way down."""
    limits = [name for name in ("max_drop", "max_error") if getattr(gate, name) is not None]
    if not limits:
        raise JobError(
            "--smallest goes as far as the gate allows, and no gate says how bad the student may be.\n"
            "  Pass --max-drop 1, or --max-error 0.1 for models that do not classify."
        )
    if all(name in gate.warn_only for name in limits):
        raise JobError(
            f"--smallest needs a gate that fails, and --warn-only lifts {limits[0].replace('_', '-')}.\n"
            "  Leave --warn-only out."
        )
