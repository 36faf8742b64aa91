"""Which tgt_fast is tested, on which backends, and how hypothesis behaves in CI."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

# A fresh environment has no compiled modules. Unless the first process that imports PyTorch may keep them, each of the
# hundreds that the tests start compiles it again, for seconds.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None) is not None:
    sys.dont_write_bytecode = False

# Of several processes that run tests side by side each gets its share of the cores, and so do its children.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

# A job in a shell's background begins with interruptions ignored, and whatever it starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import covering
import emulated_gpu
import hypothesis
import interpreter_kit
import once
import pytest
import real_gpu
import torch

# Triton decides when it is imported whether its kernels run on a GPU or, interpreted, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import tgt_fast
from tgt_fast.kernels import select
from tgt_fast.kernels import triton as triton_backend
from tgt_fast.kernels.native import cuda

REQUIRE_NATIVE = os.environ.get("TGT_FAST_REQUIRE_NATIVE") == "1"
REQUIRE_CUDA = os.environ.get("TGT_FAST_REQUIRE_CUDA") == "1"

# They test formulas of autograd that all compiled backends share, by hundreds of calls: too many for an interpreter.
OF_THE_OPS_ALONE = {"test_gradcheck_in_float64", "test_the_sphere_can_be_differentiated_twice"}

# Files of tests, or of fixtures, that take many seconds each.
LONG = {
    "test_triton_launch.py", "test_gpu_tests_host.py", "test_cuda_races.py", "test_cuda_launch.py",
    "test_demo_digits.py", "test_demo_glyphs.py", "test_demo_lm.py", "test_compile.py", "test_fit_failures.py",
    "test_fuzz.py", "test_kills.py", "test_gpu_calls.py", "test_linear_autograd.py",
    "test_cache_frameworks.py", "test_triton.py",
}  # fmt: skip

# Whose compiler does not trace this package's ops (docs/limits.md says what of it can be used there).
OLD_COMPILER = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7)

hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """What the compiler of PyTorch 2.6 refuses skips the test, with its reason."""
    try:
        return (yield)
    except Exception as error:
        if OLD_COMPILER and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            pytest.skip(f"the compiler of PyTorch {torch.__version__}: {str(error).splitlines()[0]}")
        raise


def _native_reason() -> str:
    """Why the compiled core cannot run here; empty when it can."""
    (row,) = (row for row in tgt_fast.backends() if row.name == "native")
    return "" if row.available else row.reason


def _cuda_reason() -> str:
    """Why the compiled core cannot run on a GPU here; empty when it can."""
    return _native_reason() or cuda.status()


def _tested_package() -> Path:
    """The tgt_fast under test. From the source tree, Python would import that instead of the wheel."""
    tested = Path(tgt_fast.__file__).resolve()
    try:
        installed = metadata.distribution("tgt-fast")
    except metadata.PackageNotFoundError:
        return tested
    for file in installed.files or ():
        if file.as_posix() == "tgt_fast/__init__.py":
            wheel = Path(str(installed.locate_file(file))).resolve()
            if wheel != tested:
                raise pytest.UsageError(
                    f"tgt_fast is installed at {wheel} but the tests import {tested}; "
                    "run the `pytest` command, not `python -m pytest`, or uninstall the wheel"
                )
    return tested


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: many tests wait for processes that they have started."""
    return 1 + (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until all tests are collected
    config.pluginmanager.register(once.Once(), "once")
    tested = _tested_package()
    reason = _native_reason()
    if REQUIRE_NATIVE and reason:
        raise pytest.UsageError(f"TGT_FAST_REQUIRE_NATIVE=1, but {tested} has no usable compiled core: {reason}")

    if REQUIRE_CUDA and _cuda_reason():
        raise pytest.UsageError(f"TGT_FAST_REQUIRE_CUDA=1, but {tested} cannot run on a GPU: {_cuda_reason()}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what Triton has no kernels for, what the grids do without, and what has passed of the same sources."""
    dropped = {item for item in items if _interprets(item) and _not_for_triton(item)}
    dropped |= set(covering.thin([item for item in items if item not in dropped]))
    known = config.pluginmanager.get_plugin("once")
    dropped |= set(known.unneeded(config, [item for item in items if item not in dropped]))
    if dropped:
        config.hook.pytest_deselected(items=[item for item in items if item in dropped])
        items[:] = [item for item in items if item not in dropped]
    # Last come short ones: a process that begins a minute's work when the others are done keeps them all waiting.
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish() -> None:
    """What lives as long as the tests' process, millions of objects, the garbage collector need not look at."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.freeze()  # nor when pytest, at the end, looks for what was left behind
    atexit.register(gc.unfreeze)  # bindings complain of what outlives the interpreter


def _interprets(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("backend") == "triton"


def _not_for_triton(item: pytest.Item) -> bool:
    return item.get_closest_marker("records") is not None or item.name.partition("[")[0] in OF_THE_OPS_ALONE


def pytest_report_header(config: pytest.Config) -> list[str]:
    reason = _native_reason()
    return [
        f"tgt_fast: {tgt_fast.__version__} from {_tested_package().parent}",
        f"native: {reason or 'available'}",
        f"CUDA: {_cuda_reason() or 'available'}",
    ]


@pytest.fixture(scope="session")
def native() -> str:
    """The name of the compiled backend, for tests of what it alone promises."""
    reason = _native_reason()
    if reason:
        pytest.skip(f"no compiled core: {reason}")
    return "native"


@pytest.fixture(scope="session")
def gpu() -> str:
    """The device of tests that need a real one."""
    reason = _cuda_reason()
    if reason:
        pytest.skip(f"no GPU: {reason}")
    return "cuda"


@pytest.fixture
def room() -> Iterator[Callable[[int], None]]:
    """For tests of large tensors: ``room(gigabytes)`` waits until the device has so much, which is given back."""
    yield real_gpu.wait_for_memory
    real_gpu.give_memory_back()


@pytest.fixture(scope="session", params=["reference", "native"])
def host_backend(request: pytest.FixtureRequest) -> str:
    """The backends that look at values on a CPU before they run: on a device that would mean waiting for it."""
    return str(request.getfixturevalue("native") if request.param == "native" else request.param)


@pytest.fixture(scope="session")
def emulated(request: pytest.FixtureRequest, native: str) -> ModuleType:
    """The CUDA kernels on an emulated device."""
    reason = emulated_gpu.why_not()
    if reason:
        pytest.skip(f"no emulated GPU: {reason}")
    return emulated_gpu.build(request.config.cache.mkdir("emulated_gpu"))  # type: ignore[union-attr]


@pytest.fixture(scope="session")
def interpreted() -> str:
    """The name of the Triton backend, in its interpreter on CPU tensors."""
    reason = triton_backend.refusal("distill", (torch.empty(0),))
    if reason:
        pytest.skip(f"no interpreted Triton: {reason}")
    interpreter_kit.put_its_functions_in_once_a_launch()
    return "triton"


@pytest.fixture(
    scope="session",
    params=["reference", "native", "emulated", "triton", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can run here.

    "emulated" is the native one with its CUDA kernels on an emulated device, "cuda" the native one on a real device,
    where the kernels' tensors are sent to and brought back from; "triton" runs in its interpreter.
    """
    if request.param == "reference":
        return "reference"
    if request.param == "cuda":
        request.getfixturevalue("gpu")
    return str(request.getfixturevalue("interpreted" if request.param == "triton" else "native"))


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """The emulated or the real device, for the duration of a test that asks for it."""
    callspec = getattr(request.node, "callspec", None)
    where = None if callspec is None else callspec.params.get("backend")
    if where == "emulated":
        with emulated_gpu.tensors_on_an_emulated_gpu(request.getfixturevalue("emulated")):
            yield
    elif where == "cuda":
        with real_gpu.tensors_moved_to(torch.device(request.getfixturevalue("gpu"))):
            yield
    else:
        yield


@pytest.fixture(scope="session")
def child_environment() -> dict[str, str]:
    """An environment in which a child process imports the same tgt_fast as this one."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that writes the pages' tables, which finds its neighbours in its own folder."""
    folder = Path(__file__).parent.parent / "benchmarks"
    if not folder.is_dir():
        pytest.skip("the tests run outside a checkout")
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module("tables")


@pytest.fixture
def none_chosen(monkeypatch: pytest.MonkeyPatch) -> str:
    """The value of ``backend`` for a call that is refused whatever runs it: it must not come to the choice."""

    def choose(op: str, backend: str, tensors: object) -> str:
        select.requested(backend)  # refuses names of no backend
        raise AssertionError("the call was not refused before a backend was chosen")

    monkeypatch.setattr(select, "choose", choose)
    return "auto"


@pytest.fixture(params=["formula", "native", "reference rows"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The value of ``backend`` for a loss from hidden states.

    The formula itself, chunks on the compiled kernel, or chunks on the reference's rows.
    """
    if request.param == "formula":
        return "reference"
    if request.param == "native":
        return str(request.getfixturevalue("native"))
    monkeypatch.setattr(select, "choose", lambda op, backend, tensors: "reference")
    return "auto"


@pytest.fixture(scope="session", autouse=True)
def _away_from_the_sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """``python -c`` puts its working directory first on the path: in a checkout it would find the bare sources."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("away"))
    yield
    os.chdir(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of tiny tensors and many steps, where a second thread would only wait, busily, for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
