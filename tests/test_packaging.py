"""brainsweep as users install it: what is in the wheel, and that what lies around it is not taken for ours."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from process_helpers import MADE_SMALL, ROOT, end_marked, environment, free_ports
from small_cohort import write_small_cohort

PACKAGES = ("core", "distributed", "search_spaces")
NOT_OURS = """
from pathlib import Path
Path(__file__).with_suffix(".imported").touch()
raise RuntimeError("a package that is not brainsweep's was imported")
"""
AS_THE_SCRIPT = ("-P", "-c", "from brainsweep import main; main()")
"""`brainsweep`, as the installed script calls it: the current folder is not on the path."""
AS_A_MODULE = ("-m", "distributed")


def files_under(folder):
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the working tree: building a wheel leaves files beside the sources."""
    ignored = shutil.ignore_patterns(
        ".*", "__pycache__", "build", "cohorts", "runs", "fixtures", "*.egg-info", "*.h5", "*.png"
    )
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("built") / "checkout", ignore=ignored)


@pytest.fixture(scope="module")
def wheel(checkout):
    folder = checkout.parent / "wheel"
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", folder, checkout],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    [wheel] = folder.iterdir()
    return wheel


@pytest.fixture
def installed(wheel, tmp_path):
    """The unpacked wheel, as it lies in the site-packages of an environment."""
    folder = tmp_path / "environment" / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def elsewhere(tmp_path):
    """The current folder of a user who has a core.py."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "core.py").write_text(NOT_OURS)
    yield folder
    assert not list(folder.rglob("*.imported"))


def run_python(*words, path, cwd):
    given = environment(PYTHONPATH=os.pathsep.join(map(str, path)))
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=given, capture_output=True, text=True, check=False
    )


def assert_refused(done, *parts):
    """One line and exit code 2."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    for part in ("error: ", *map(str, parts)):
        assert part in done.stderr


def test_the_wheel_holds_every_file_of_the_packages_and_no_others(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        modes = {each.filename: each.external_attr >> 16 for each in archive.infolist()}
    wanted = {f"{package}/{file}" for package in PACKAGES for file in files_under(ROOT / package)}
    assert held == wanted | {"brainsweep.py"}
    for name in (
        *(f"{package}/py.typed" for package in PACKAGES),
        *(f"distributed/clusters/{file}" for file in ("README.md", "slurm.sbatch", "kuberay-rayjob.yaml")),
        "search_spaces/brain_age.yaml",
        "core/report/report.html",
    ):
        assert name in held
    assert modes["distributed/clusters/sweep_or_resume.sh"] & 0o111


def test_the_version_is_the_installed_one_or_it_is_said_that_there_is_none(wheel, installed, elsewhere):
    version = wheel.name.split("-")[1]
    done = run_python(*AS_THE_SCRIPT, "--version", path=[installed], cwd=elsewhere)
    assert (done.returncode, done.stdout) == (0, f"brainsweep {version}\n"), done.stderr
    [metadata] = installed.glob("*.dist-info")
    shutil.rmtree(metadata)
    # -S leaves out the environment of this test, in which brainsweep is installed, and its dependencies with it.
    dependencies = elsewhere.parent / "dependencies"
    dependencies.mkdir()
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if "brainsweep" not in package.name:
            (dependencies / package.name).symlink_to(package)
    done = run_python("-S", *AS_THE_SCRIPT, "--version", path=[installed, dependencies], cwd=elsewhere)
    assert (done.returncode, done.stdout) == (0, f"brainsweep, not installed, from {installed}\n"), (
        done.stderr
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_installed_over_ours_is_named_and_not_imported(installed, elsewhere, package):
    intruder = installed / package / "__init__.py"
    intruder.write_text(NOT_OURS)  # as pip does with Dask's `distributed`
    (installed / package / "client.py").touch()
    done = run_python(*AS_THE_SCRIPT, "--version", path=[installed], cwd=elsewhere)
    assert_refused(done, intruder, "another package", "environment of its own")
    assert not intruder.with_suffix(".imported").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_what_was_removed_with_another_package_is_named(installed, elsewhere, package):
    (installed / package / "__init__.py").unlink()  # as `pip uninstall distributed` does
    done = run_python(*AS_THE_SCRIPT, "--version", path=[installed], cwd=elsewhere)
    assert_refused(done, installed / package / "__init__.py", "missing", "environment of its own")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_earlier_on_the_path_is_named_and_not_imported(installed, elsewhere, package):
    intruder = elsewhere.parent / "dask" / package / "__init__.py"
    intruder.parent.mkdir(parents=True)
    intruder.write_text(NOT_OURS)
    done = run_python(*AS_THE_SCRIPT, "--version", path=[intruder.parents[1], installed], cwd=elsewhere)
    assert_refused(done, intruder, installed / package)
    assert not intruder.with_suffix(".imported").exists()


def test_a_file_of_the_user_is_named_where_python_puts_the_current_folder_first(installed, elsewhere):
    assert_refused(
        run_python(*AS_A_MODULE, "--version", path=[installed], cwd=elsewhere), elsewhere / "core.py"
    )
    (elsewhere / "core.py").unlink()
    done = run_python(*AS_A_MODULE, "--version", path=[installed], cwd=elsewhere)
    assert done.stdout.startswith("brainsweep "), done.stderr


def git(folder, *words):
    return subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words],
        cwd=folder, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip


def commit_of(packages):
    """Commit and state that a run of this brainsweep would record."""
    code = "from distributed.run.code import code_version as v; print(v().commit or None, v().dirty)"
    done = run_python("-P", "-c", code, path=[packages], cwd=packages.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("where", ["environment/site-packages", "."])
def test_the_commit_of_another_project_around_the_environment_is_not_ours(installed, tmp_path, where):
    """Also if the packages lie at the very top of it, as after `pip install --target .`."""
    theirs = (tmp_path / where).resolve()
    (theirs / "analysis.py").write_text("")
    git(theirs, "init", "--quiet")
    git(theirs, "add", "analysis.py")
    git(theirs, "commit", "--quiet", "-m", "theirs")
    (theirs / "analysis.py").write_text("changed")
    assert commit_of(installed) == "None False"


def test_the_commit_of_our_own_checkout_is_recorded(installed):
    git(installed, "init", "--quiet")
    git(installed, "add", ".")
    git(installed, "commit", "--quiet", "-m", "ours")
    commit = git(installed, "rev-parse", "--short=12", "HEAD")
    assert commit_of(installed) == f"{commit} False"
    (installed / "core" / "errors.py").open("a").write("# changed\n")
    assert commit_of(installed) == f"{commit} True"


@pytest.fixture
def in_environment(wheel, elsewhere):
    """Run a command of an environment with the wheel in it, in a folder with a core.py; Ray's processes end with it."""
    folder = elsewhere.parent / "installed"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet", "--no-deps",
         "--no-index", wheel],
        check=True,
    )  # fmt: skip
    [site_packages] = folder.glob("lib/python*/site-packages")
    # Our dependencies, after everything of its own. Python reads no .pth files there: not that of an editable install.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    mark = f"packaging-{os.getpid()}"
    given = environment(mark, PATH=f"{folder / 'bin'}:{os.environ['PATH']}")
    del given["PYTHONPATH"]

    def run(*words, **more):
        return subprocess.run(
            list(map(str, words)), cwd=elsewhere, env=given | more, capture_output=True, text=True, timeout=400,
            check=False,
        )  # fmt: skip

    yield run
    assert not end_marked(mark)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_installed_brainsweep_sweeps_reports_and_resumes_beside_a_core_of_the_user(
    in_environment, elsewhere
):
    found = in_environment("python", "-P", "-c", "import brainsweep as b; print(b.FOLDER, b.find_intruder())")
    packages, intruder = found.stdout.split()
    assert Path(packages).is_relative_to(elsewhere.parent / "installed")
    assert intruder == "None"
    write_small_cohort(elsewhere / "cohort", subjects=24)
    small = ["--folds", 2, "--slots", 1, *MADE_SMALL]

    done = in_environment("brainsweep", "sweep", "cohort", "--out", "run", "--trials", 2, *small)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(pd.read_csv(elsewhere / "run" / "trials.csv")) == 2
    (elsewhere / "run" / "report.html").unlink()
    done = in_environment("brainsweep", "report", "run")
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "run" / "report.html").exists()

    gcs, client = free_ports(2)
    (elsewhere / "token").write_text("0123456789abcdef" * 4)
    temporary = tempfile.mkdtemp(prefix="ray-")  # short: Ray's socket paths may have 107 bytes
    cluster = {
        "RAY_ADDRESS": f"127.0.0.1:{gcs}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(elsewhere / "token"),
    }
    started = in_environment(
        "python", "-m", "ray.scripts.scripts", "start", "--head", "--port", gcs, "--ray-client-server-port", client,
        "--num-cpus", 2, "--object-store-memory", 200_000_000, "--temp-dir", temporary, "--include-dashboard", "false",
        "--disable-usage-stats", **cluster,
    )  # fmt: skip
    assert started.returncode == 0, started.stdout + started.stderr
    script = Path(packages) / "distributed" / "clusters" / "sweep_or_resume.sh"
    words = ["sh", script, elsewhere / "on a cluster", elsewhere / "cohort", "--trials", 2, *small]
    # The first call begins the run, the second finds it finished.
    for said in ("Leaderboard", "nothing left to do"):
        done = in_environment(*words, **cluster)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert said in done.stdout
    assert len(pd.read_csv(elsewhere / "on a cluster" / "trials.csv")) == 2
    shutil.rmtree(temporary, ignore_errors=True)
