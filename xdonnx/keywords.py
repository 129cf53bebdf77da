"""The keywords of `xdonnx.compress`, `verify` and `decompose`: the flags of the commands, and what each takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

import numpy as np
import onnx

from xdonnx.gate import Gate
from xdonnx.images import Preprocess
from xdonnx.memory import Held

Place: TypeAlias = str | os.PathLike[str]
Model: TypeAlias = Place | onnx.ModelProto
Samples: TypeAlias = Place | Sequence[Place] | Held


class SharedOptions(TypedDict, total=False):
    """What `verify` and `compress` may be told, each as the flag of that name.

    Parameters
    ----------
    labels : path or (n,) integers
        Classes of the samples, where they do not come with them.
    per_class, max_shots : int
        Draw so many, of each class or in all. An iterable without a length is not asked for more.
    holdout : float, path or samples
        Those that judge: a fraction, or others. Default: 0.2 for `compress`; all are for `verify`.
    skip_bad : bool
        Leave out unreadable files; the report names them.
    synthetic_shots : int
        Random noise instead of samples, just to try things out.
    preset, mean, std, scale, color, layout, resize, crop
        How pixels become numbers: the fields of `Preprocess`.
    preprocess : Preprocess
        All of these at once.
    input_shape : dict of str to tuple of int
        Shapes of inputs whose sizes the graph leaves free.
    max_drop, max_error, min_shrink, max_latency_ratio, confidence, warn_only
        What the student must keep: the fields of `Gate`. Fractions are numbers: 0.1 is 10 %.
    report_dir : path
        Where the report is written. Default: beside `out` for `compress`; nowhere for `verify`.
    device : str
        'cpu' or 'cuda:0'; `compress` also takes 'auto', its default.
    seed : int
        Of every draw.
    """

    labels: Place | Sequence[int] | np.ndarray[Any, Any]
    per_class: int
    max_shots: int
    holdout: float | Samples
    skip_bad: bool
    synthetic_shots: int
    preset: str
    mean: Sequence[float]
    std: Sequence[float]
    scale: float
    color: str
    layout: str
    resize: int
    crop: int
    preprocess: Preprocess
    input_shape: Mapping[str, Sequence[int]]
    max_drop: float
    max_error: float
    min_shrink: float
    max_latency_ratio: float
    confidence: float
    warn_only: str | Sequence[str]
    report_dir: Place
    device: str
    seed: int


class VerifyOptions(SharedOptions, total=False):
    """What `verify` may be told: besides what :class:`SharedOptions` lists.

    Parameters
    ----------
    strict : bool
        Judge also what `compress` always does: the file smaller, not slower beyond the noise, weights removed.
    """

    strict: bool


class CompressOptions(SharedOptions, total=False):
    """What `compress` may be told: besides what :class:`SharedOptions` lists, each as the flag of that name.

    Parameters
    ----------
    macs, params : float
        Of the teacher's, at most; one target. Default: macs=0.5.
    size, latency : float or str
        Of the student's file and of its median run in onnxruntime: shares of the teacher's, or amounts such as '10MB'
        and '5ms'; other targets.
    smallest : bool
        As few MACs as the gate allows; another target.
    keep : float
        Units kept in each layer that may lose some; another target.
    plan : path
        What `xdonnx plan` wrote; another target.
    student : path
        A student that another tool pruned or decomposed, to be refitted instead of a target.
    match : path
        What `xdonnx match` wrote of it.
    structure : {'channel', 'element', 'n:m'}
        What goes.
    include, exclude : str or sequence of str
        Patterns of layers.
    round_to : int or 'auto'
        Keep channels in multiples of it.
    residual : bool
        Also remove channels that several layers add into.
    allocation : {'auto', 'measured', 'uniform'}
        Whether layers lose by their error curves.
    pool : path, sequence of paths, array, dict, tuple, iterable or Shots
        Unlabelled images, related to the task or not, as a second source besides the samples.
    pool_draw : {'preferential', 'uniform'}
        Whether images that look related to the teacher's task are drawn from it more often.
    method : str or sequence of str
        As `xdonnx methods` lists them; several are chained.
    connection, mu, alpha, beta, solver, ridge, views, steps, adversarial, preset_effort
        How it is done: the options of the methods.
    gate : Gate
        The limits all at once, in place of max_drop and its like.
    force : bool
        Replace an `out` that exists.
    external_data : {'auto', 'always', 'never'}
        Whether weights lie beside the file.
    resume : bool
        Go on with a job that was stopped.
    memory : int or str
        Bytes that may be taken, such as '8GB'. Default: 60 % of what is free.
    """

    macs: float
    params: float
    size: float | str
    latency: float | str
    smallest: bool
    keep: float
    plan: Place
    student: Place
    match: Place
    structure: str
    include: str | Sequence[str]
    exclude: str | Sequence[str]
    round_to: int | Literal["auto"]
    residual: bool
    allocation: str
    pool: Samples
    pool_draw: str
    method: str | Sequence[str]
    connection: str
    mu: float
    alpha: float
    beta: float
    solver: str
    ridge: float
    views: int
    steps: int
    adversarial: bool
    preset_effort: str
    gate: Gate
    force: bool
    external_data: str
    resume: bool
    memory: int | str


class DecomposeOptions(TypedDict, total=False):
    """What `decompose` may be told, each as the flag of that name.

    Parameters
    ----------
    macs, params : float
        Of the teacher's, at most; one target. Default: macs=0.5.
    energy : float
        Of each layer's weight, at least, as its sum of squares; another target.
    rank : int
        Of each layer; another target.
    scheme : {'auto', 'spatial', 'channel'}
        How kernels are taken apart.
    include, exclude : str or sequence of str
        Patterns of layers. The first convolution takes part only where `include` matches it.
    round_to : int or 'auto'
        Ranks are multiples of it.
    input_shape : dict of str to tuple of int
        Shapes of inputs whose sizes the graph leaves free.
    force : bool
        Replace an `out` that exists.
    external_data : {'auto', 'always', 'never'}
        Whether weights lie beside the file.
    """

    macs: float
    params: float
    energy: float
    rank: int
    scheme: str
    include: str | Sequence[str]
    exclude: str | Sequence[str]
    round_to: int | Literal["auto"]
    input_shape: Mapping[str, Sequence[int]]
    force: bool
    external_data: str
