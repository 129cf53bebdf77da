"""The pipelines in samples/pipelines do what they say: their own commands are run, on a good model and on a bad one."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import junitparser
import onnx
import pytest
import yaml
from onnx import numpy_helper

from xdonnx import read_report

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "samples"
PIPELINES = SAMPLES / "pipelines"
# How the digits' teachers were trained, and the least effort; GitHub's and GitLab's files leave both to their users.
OURS = {"PIXELS": "--preset unit", "TARGET": "--macs 60% --preset-effort fast"}


def load(name: str) -> Any:
    return yaml.safe_load((PIPELINES / name).read_text())


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the command `xdonnx` of this checkout, as an install would put it on PATH."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "xdonnx"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from xdonnx_cli.app import main; main()" "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a repository as the pipelines expect it: a teacher, a student as good and a quarter as large, samples."""
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(SAMPLES / "digits_vgg.onnx", models / "teacher.onnx")
    shutil.copy(SAMPLES / "digits_mobile.onnx", models / "student.onnx")
    shutil.copy(SAMPLES / "held_out.npz", models)
    (models / "shots").symlink_to(SAMPLES / "shots")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def damage(repository: Path) -> None:
    """Turn the weights of the student's last layer round, so that nearly every answer is wrong."""
    path = repository / "models/student.onnx"
    model = onnx.load(path)
    node = next(node for node in model.graph.node if node.op_type == "Gemm")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    onnx.save(model, path)


def shell(script: str, program: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run commands as GitHub's and GitLab's runners do: bash that ends at the first failure."""
    env = os.environ | {"PATH": f"{program}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)} | environment
    env.pop("PYTEST_CURRENT_TEST", None)
    return subprocess.run(["bash", "-e", "-c", script], env=env, capture_output=True, text=True, check=False)


def installs(script: str) -> bool:
    return bool(re.search(r"pip install|apt-get", script))


# GitHub


def steps(job: str) -> list[str]:
    """Return the commands of a job of the workflow."""
    return [step["run"] for step in load("github-actions.yml")["jobs"][job]["steps"] if "run" in step]


def settings(**other: str) -> dict[str, str]:
    """Return the environment that the workflow sets, adapted to the samples as its user would adapt it."""
    found = load("github-actions.yml")["env"]
    assert set(OURS) <= set(found)
    return {key: str(value) for key, value in found.items() if "${{" not in str(value)} | OURS | other


@pytest.mark.parametrize(("good", "code"), [(True, 0), (False, 3)])
def test_github_passes_a_good_student_and_stops_a_bad_one(
    good: bool, code: int, repository: Path, program: Path
) -> None:
    if not good:
        damage(repository)
    install, verify = steps("verify")
    assert installs(install) and not installs(verify)

    done = shell(verify, program, **settings(GITHUB_STEP_SUMMARY=str(repository / "summary")))

    assert done.returncode == code, done.stderr
    report = read_report(repository / "report")
    assert [gate.name for gate in report.gates] == ["max_drop", "min_shrink"] and report.exit_code == code
    assert report.gates[0].passed is good and report.gates[1].passed
    assert ("passed" if good else "rejected") in (repository / "summary").read_text().splitlines()[0]
    assert (repository / "report/report.html").is_file()


def test_github_verifies_only_where_there_is_a_student() -> None:
    """A pull request that brought a teacher alone failed for want of a student."""
    own = [step for step in load("github-actions.yml")["jobs"]["verify"]["steps"] if "run" in step]
    assert [step.get("if") for step in own] == ["hashFiles(env.STUDENT) != ''"] * 2
    assert "delete the one that you do not want" in (PIPELINES / "github-actions.yml").read_text().partition("name:")[0]


def test_github_keeps_a_student_that_passes(repository: Path, program: Path) -> None:
    _, compress = steps("compress")

    done = shell(compress, program, **settings())

    assert done.returncode == 0, done.stderr
    report = read_report(repository / "build/report")
    assert report.teacher and report.student and report.student.macs <= 0.6 * report.teacher.macs
    assert onnx.load(repository / "build/student.onnx").graph.node


def test_github_keeps_no_student_that_fails(repository: Path, program: Path) -> None:
    _, compress = steps("compress")

    done = shell(compress, program, **settings(GATE="--max-error 0", TARGET="--keep 0.5 --method l1-norm"))

    assert done.returncode == 3, done.stderr
    built = {path.name for path in (repository / "build").iterdir()}
    assert built == {"student.rejected.onnx", "report"}


def test_the_workflow_is_one_that_github_takes_and_no_text_of_others_reaches_the_shell() -> None:
    flow = load("github-actions.yml")

    # YAML 1.1 reads the key `on` as true.
    assert set(flow) == {"name", True, "permissions", "env", "jobs"} and set(flow[True]) == {"pull_request"}
    assert flow["permissions"] == {"contents": "read"}
    for name, job in flow["jobs"].items():
        assert {"runs-on", "timeout-minutes", "steps"} <= set(job) and not job["runs-on"].endswith("latest")
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step) and "${{" not in step.get("run", "")
            assert re.fullmatch(r"[\w/-]+@v\d+", step.get("uses", "a@v1"))
        # What a failed gate left is what one wants to look at.
        upload = job["steps"][-1]
        assert upload["if"] == "always()" and upload["with"]["path"] in ("report/", "build/"), name


@pytest.mark.parametrize("file", ["github-actions.yml", "gitlab-ci.yml"])
def test_a_pipeline_without_xdonnx_says_what_is_missing(file: str, repository: Path, program: Path) -> None:
    job = steps("verify")[0] if "github" in file else "\n".join(load(file)["model"]["before_script"])
    first = job.splitlines()[0]

    unset, given = (shell(first, program, XDONNX=value) for value in ("", "./third_party/xdonnx"))

    assert unset.returncode == 2 and "Set the" in unset.stdout
    assert given.returncode == 0 and 'pip install "$XDONNX"' in job


# GitLab


@pytest.mark.parametrize(("good", "code"), [(True, 0), (False, 3)])
def test_gitlab_judges_and_shows_the_gates_as_tests(good: bool, code: int, repository: Path, program: Path) -> None:
    if not good:
        damage(repository)
    whole = load("gitlab-ci.yml")
    job = whole["model"]
    assert all(installs(line) or line.startswith("test -n") for line in job["before_script"])
    variables = {key: str(value) for key, value in whole["variables"].items() if "$" not in str(value)}

    done = shell("\n".join(job["script"]), program, **variables | {"PIXELS": OURS["PIXELS"]})

    assert done.returncode == code, done.stderr
    assert job["artifacts"]["when"] == "always"
    suites = {suite.name: suite for suite in junitparser.JUnitXml.fromfile(job["artifacts"]["reports"]["junit"])}
    assert suites["gates"].tests == 2 and suites["gates"].failures == (0 if good else 1)
    assert not job["image"].endswith("latest") and job["stage"] in whole["stages"]
    assert (repository / job["artifacts"]["paths"][0]).is_dir()


# pre-commit


def hooks(config: str) -> dict[str, Any]:
    """Return the hooks by name, of an example or of what other repositories find in this one."""
    if config == "ours":
        return {hook["id"]: hook for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())}
    (repo,) = load(config)["repos"]
    return {hook["id"]: hook for hook in repo["hooks"]}


def committed(hook: dict[str, Any], args: list[str], files: list[str], program: Path) -> int:
    """Return the exit code of a hook, started as pre-commit does: entry, args and the files that it is for."""
    chosen = [file for file in files if re.search(hook["files"], file)] if hook.get("pass_filenames", True) else []
    command = [*shlex.split(hook["entry"]), *hook.get("args", []), *args, *chosen]
    return shell(shlex.join(command), program).returncode


def test_the_inspecting_hook_looks_at_every_model_of_a_commit(repository: Path, program: Path) -> None:
    hook = hooks("ours")["xdonnx-inspect"]
    files = ["models/teacher.onnx", "README.md", "models/student.onnx"]

    good = committed(hook, [], files, program)
    (repository / "models/student.onnx").write_bytes(b"not a model")
    bad = committed(hook, [], files, program)

    assert (good, bad) == (0, 4)


def test_the_verifying_hook_stops_a_commit(repository: Path, program: Path) -> None:
    hook = hooks("pre-commit-config.yaml")["xdonnx-verify"]

    good = committed(hook, ["--preset", "unit"], ["models/student.onnx"], program)
    damage(repository)
    bad = committed(hook, ["--preset", "unit"], ["models/student.onnx"], program)

    assert (good, bad) == (0, 3)


def test_the_example_has_the_hooks_that_this_repository_offers() -> None:
    """So that one of both is run for the other too."""
    ours, example = hooks("ours"), hooks("pre-commit-config.yaml")

    assert set(ours) == set(example)
    for name, hook in ours.items():
        assert hook["language"] == "python" and example[name]["language"] == "system"
        assert hook["entry"] == example[name]["entry"]
        assert hook.get("pass_filenames") is example[name].get("pass_filenames")


# Docker


def instructions() -> list[tuple[str, str]]:
    text = (PIPELINES / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines()]


def test_the_image_is_pinned_small_and_nobodys() -> None:
    """What hadolint asks for too; it is run where there is one."""
    found = instructions()
    kinds = [kind for kind, _ in found]

    (base,) = [value for kind, value in found if kind == "FROM"]
    assert re.fullmatch(r"python:3\.1\d(\.\d+)?-slim-\w+", base)
    for kind, value in found:
        if kind == "RUN" and "pip install" in value:
            assert "--no-cache-dir" in value
            packages = value.split("install", 1)[1].split()
            assert all("==" in part for part in packages if part.startswith('"'))
        if kind == "RUN" and "apt-get install" in value:
            assert "--no-install-recommends" in value and "rm -rf /var/lib/apt/lists/*" in value
    users = [value for kind, value in found if kind == "USER"]
    assert users and users[-1].split(":")[0].isdecimal() and int(users[-1].split(":")[0]) > 0
    assert kinds.index("USER") < kinds.index("ENTRYPOINT") and "ADD" not in kinds
    if shutil.which("hadolint"):
        subprocess.run(["hadolint", str(PIPELINES / "Dockerfile")], check=True)


def test_what_the_image_copies_makes_a_package(tmp_path: Path) -> None:
    """The files that COPY names are all that a build needs."""
    source = tmp_path / "src"
    source.mkdir()
    for value in (value for kind, value in instructions() if kind == "COPY"):
        *names, target = value.split()
        for name in names:
            path = ROOT / name
            if path.is_dir():
                shutil.copytree(path, source / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, source)
    code = "from setuptools.build_meta import build_wheel; build_wheel('..')"

    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("xdonnx-*.whl")
    listed = subprocess.run([sys.executable, "-m", "zipfile", "-l", wheel], capture_output=True, text=True, check=True)
    for name in ("xdonnx/py.typed", "xdonnx/api.py", "xdonnx_cli/app.py", "entry_points.txt"):
        assert name in listed.stdout


def test_the_images_commands_run(repository: Path, program: Path) -> None:
    entry, default = (shlex.join(yaml.safe_load(dict(instructions())[kind])) for kind in ("ENTRYPOINT", "CMD"))
    for value in (value for kind, value in instructions() if kind == "RUN" and not installs(value)):
        assert shell(value, program).returncode == 0
    assert "Usage: xdonnx" in shell(f"{entry} {default}", program).stdout
    text = (PIPELINES / "Dockerfile").read_text()
    (usage,) = re.findall(r"^# +docker run .*--volume \"\$PWD:/work\" xdonnx (.*)$", text, re.MULTILINE)
    damage(repository)

    done = shell(f"{entry} {usage} --preset unit", program)

    assert done.returncode == 3, done.stderr
    assert read_report(repository / "report").exit_code == 3


# pytest


def test_the_tests_of_a_model_pass_for_a_good_one_and_name_what_a_bad_one_lost(repository: Path, program: Path) -> None:
    tests = PIPELINES / "test_model.py"
    command = f"{sys.executable} -m pytest -q -p no:cacheprovider -c /dev/null --rootdir . {tests}"

    good = shell(command, program)
    damage(repository)
    bad = shell(command, program)

    assert good.returncode == 0 and "3 passed" in good.stdout, good.stdout
    assert bad.returncode == 1 and "1 failed, 2 passed" in bad.stdout and "max_drop: " in bad.stdout


@pytest.mark.parametrize("path", sorted(PIPELINES.iterdir()), ids=lambda path: path.name)
def test_the_folders_readme_names_every_pipeline(path: Path) -> None:
    if path.name != "__pycache__":
        assert f"`pipelines/{path.name}`" in (SAMPLES / "README.md").read_text()
