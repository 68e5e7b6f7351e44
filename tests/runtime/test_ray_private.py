"""Ray's private names behave as `cxr/runtime/ray_private.py` expects, and are used nowhere else."""

from __future__ import annotations

import ast
import logging
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from cxr.runtime import ray_private
from tests.conftest import REPOSITORY

ALLOWED = {"cxr/runtime/ray_private.py", "tests/ray_private.py", "tests/runtime/test_ray_private.py"}
PRIVATE_MODULE = re.compile(r"\bray\.([a-z]\w*\.)*_[a-z]\w*")
PRIVATE_OPTIONS = re.compile(r"^_(system_config|node_ip_address|temp_dir|redis\w*|metrics\w*|tracing\w*|labels)$")


def strings_and_names(path: Path) -> list[str]:
    """The modules that a file imports, its string constants, attributes and keyword arguments."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.Attribute):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword):
            found.append(node.arg or "")
    return found


def is_private(name: str) -> bool:
    return bool(PRIVATE_MODULE.search(name) or PRIVATE_OPTIONS.match(name))


def test_private_names_are_recognized() -> None:
    for name in ("ray._private.worker", "ray.data._internal.progress", "ray.train.v2._internal.x", "_system_config"):
        assert is_private(name), name
    for name in ("ray.__version__", "ray.train.torch", "ray.util.annotations", "array._x", "ray.data", "_name"):
        assert not is_private(name), name


def test_private_names_are_in_one_file_only() -> None:
    paths = [path for folder in ("cxr", "jobs", "cluster", "tests") for path in (REPOSITORY / folder).rglob("*.py")]
    users = {str(path.relative_to(REPOSITORY)) for path in paths if any(map(is_private, strings_and_names(path)))}
    assert users - ALLOWED == set()
    assert "cxr/runtime/ray_private.py" in users


def test_the_installed_ray_version_is_the_one_the_code_was_written_for() -> None:
    assert ray.__version__ == ray_private.READ_FROM


def source(module: str) -> str:
    return (Path(ray.__file__).parent / module).read_text()


def test_ray_init_takes_the_options_of_a_start() -> None:
    for name in ray_private.start_options("127.0.0.1", 5):
        assert f'kwargs.pop("{name}"' in source("_private/worker.py")
    core = (Path(ray.__file__).parent / "_raylet.so").read_bytes()
    assert b"task_oom_retries" in core


SIGNALS = """
import signal
handler = lambda *_: None
signal.signal(signal.SIGTERM, handler)
from cxr.runtime import ray_private
ray_private.keep_signal_handlers()
from ray._private import ray_constants, utils
utils.set_sigterm_handler(lambda *_: None)
assert signal.getsignal(signal.SIGTERM) is handler
assert ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER is True
ray_private.stay_on_loopback()
from ray._private import services
assert services.resolve_ip_for_localhost("127.0.0.1") == "127.0.0.1"
"""


def test_handlers_and_loopback_addresses_are_unchanged() -> None:
    subprocess.run([sys.executable, "-c", SIGNALS], check=True, cwd=REPOSITORY)


RAYS_SIGNALS = """
import signal
from ray._private import utils
utils.set_sigterm_handler(signal.SIG_IGN)
assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
"""


def test_ray_sets_signal_handlers_in_the_expected_places() -> None:
    subprocess.run([sys.executable, "-c", RAYS_SIGNALS], check=True)  # here, `keep_signal_handlers` may have run
    assert "ray._private.utils.set_sigterm_handler(" in source("_private/node.py")
    assert b"RAY_DISABLE_FAILURE_SIGNAL_HANDLER" in (Path(ray.__file__).parent / "_raylet.so").read_bytes()
    assert "if not ray_constants.ENABLE_RAY_CLUSTER:" in source("_private/services.py")


def test_a_job_may_set_a_second_runtime_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_OVERRIDE_JOB_RUNTIME_ENV", "0")
    ray_private.allow_another_runtime_environment()
    assert 'os.getenv("RAY_OVERRIDE_JOB_RUNTIME_ENV") == "1"' in source("_private/worker.py")


def test_the_dashboard_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import node, worker

    assert isinstance(node.Node.webui_url, property)
    monkeypatch.setattr(worker, "_global_node", None)
    assert ray_private.dashboard_url() == ""
    monkeypatch.setattr(worker, "_global_node", SimpleNamespace(webui_url="127.0.0.1:8265"))
    assert ray_private.dashboard_url() == "127.0.0.1:8265"


def test_resources_of_a_cluster_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.state import GlobalState, state
    from ray.core.generated import autoscaler_pb2

    monkeypatch.setattr(GlobalState, "get_cluster_config", lambda self: None)
    assert state.get_max_resources_from_cluster_config() is None
    assert ray_private.largest_resources() == {}
    assert ray_private.machine_types() == []
    config = autoscaler_pb2.ClusterConfig()
    config.node_group_configs.add(resources={"CPU": 8}, max_count=3)
    monkeypatch.setattr(GlobalState, "get_cluster_config", lambda self: config)
    assert ray_private.largest_resources() == {"CPU": 24}
    assert ray_private.machine_types() == [{"CPU": 8}]


def test_node_types_are_reported_where_ray_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import _raylet
    from ray._private.state import GlobalState
    from ray.core.generated import autoscaler_pb2

    stored: dict[tuple[str, str], bytes] = {}
    monkeypatch.setattr(
        ray_private, "_internal_kv_put", lambda key, value, namespace: stored.update({(namespace, key): value})
    )
    types = {
        "head": {"resources": {"CPU": 4, "GPU": 0}, "max_workers": 0},
        "data": {"resources": {"CPU": 16}, "max_workers": 3},
        "train": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 2},
    }
    ray_private.report_node_types(types, "head")
    place = (_raylet.GCS_AUTOSCALER_STATE_NAMESPACE, _raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY)
    config = autoscaler_pb2.ClusterConfig.FromString(stored[place])
    assert "ray._raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY" in source("_private/state.py")
    monkeypatch.setattr(GlobalState, "get_cluster_config", lambda self: config)
    assert ray_private.largest_resources() == {"CPU": 4 + 3 * 16 + 2 * 8, "GPU": 2}


PRINTING = """
import inspect
from cxr.runtime import ray_private
from ray._private import worker
assert list(inspect.signature(worker.print_to_stdstream).parameters) == ["data", "ignore_prefix"]
shown = []
ray_private.show_worker_lines_with(shown.append)
worker.print_to_stdstream({"lines": ["a"]}, ignore_prefix=True)
assert shown == [{"lines": ["a"]}]
assert not ray_private.is_worker_process()
worker.global_worker.set_mode(worker.WORKER_MODE)
assert ray_private.is_worker_process()
"""


def test_lines_of_workers_go_where_they_are_to_be_shown() -> None:
    subprocess.run([sys.executable, "-c", PRINTING], check=True, cwd=REPOSITORY)
    printing = source("_private/worker.py")
    assert "functools.partial(print_to_stdstream, ignore_prefix=ignore_prefix)" in printing
    assert printing.count("print_to_stdstream(") == 2, "the function and its call with errors"
    assert "LOG_PREFIX_EVENT_SUMMARY in line" in printing


def test_failed_starts_are_logged_where_they_are_silenced() -> None:
    assert "logger = logging.getLogger(__name__)" in source("_private/services.py")
    logger = logging.getLogger(ray_private.START_LOGGER)
    ray_private.quiet_failed_starts()
    record = logging.LogRecord(logger.name, logging.ERROR, "", 0, "the end of a log", None, None)
    assert not logger.filter(record)
    logger.filters.clear()


def test_ray_data_warns_of_progress_bars_through_the_logger_that_is_silenced() -> None:
    import ray.data._internal.progress as progress

    assert progress.logger.name == ray_private.DATA_PROGRESS_LOGGER


def test_each_split_has_its_own_execution_options() -> None:
    from ray.data import ExecutionOptions
    from ray.train import DataConfig

    config = DataConfig(execution_options=ExecutionOptions(preserve_order=True))
    options = ray_private.execution_options(config, "train")
    assert options.preserve_order
    options.preserve_order = False
    assert ray_private.execution_options(config, "train").preserve_order


def test_a_wrapped_failure_is_unwrapped() -> None:
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    error = ValueError("the failure itself")
    assert ray_private.wrapped_error(UserExceptionWithTraceback(error, "a traceback")) is error
    assert ray_private.wrapped_error(error) is None


def test_training_leaves_ctrl_c_to_the_job() -> None:
    from ray.train.torch import TorchTrainer

    trainer = ray_private.torch_trainer(lambda: None)
    assert isinstance(trainer, TorchTrainer)
    assert "self._register_sigint_handler(controller)" in source("train/v2/api/data_parallel_trainer.py")
    before = signal.getsignal(signal.SIGINT)
    trainer._register_sigint_handler(None)  # pyright: ignore[reportArgumentType]
    assert signal.getsignal(signal.SIGINT) is before
