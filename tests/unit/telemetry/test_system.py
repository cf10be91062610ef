import asyncio
import os
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from minserve.telemetry.metrics import Metrics
from minserve.telemetry.system import SystemMetrics, look, parse


def test_the_machine_is_seen() -> None:
    values = {name: value for name, value, labels in look() if labels == ("Host",)}
    assert list(values) == [
        *("CPUUtilization", "MemoryUsed", "MemoryAvailable", "MemoryUtilization"),
        *("DiskUsage", "DiskUtilization", "DiskAvailable"),
    ]
    assert 0 < values["MemoryUtilization"] <= 100
    assert values["DiskUsage"] > 0


def test_gpus_are_seen_one_by_one_as_far_as_their_driver_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    def rates(index: int) -> SimpleNamespace:
        if index == 1:  # in MIG mode
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(gpu=40)

    def shut_down() -> None:
        ended.append(True)

    ended: list[bool] = []
    fakes = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": shut_down,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": lambda index: SimpleNamespace(used=2**30, total=2**32),
        "nvmlDeviceGetUtilizationRates": rates,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(pynvml, name, fake)
    values = [value for value in look() if value[0].startswith("GPU")]
    assert values == [
        ("GPUMemoryUtilization", 25.0, ("Host", "0")),
        ("GPUMemoryUsed", 1024.0, ("Host", "0")),
        ("GPUUtilization", 40, ("Host", "0")),
        ("GPUMemoryUtilization", 25.0, ("Host", "1")),
        ("GPUMemoryUsed", 1024.0, ("Host", "1")),
    ]
    assert ended == [True]
    assert not [value for value in look(gpus=False) if value[0].startswith("GPU")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "CPUUtilization.Percent:12.5|#Level:Host|#hostname:h,timestamp:17",
            (("CPUUtilization", 12.5, ("Host",)), "h"),
        ),
        ("G.Percent:-1e3|#Level:Host,device_id:0|#type:GAUGE|#hostname:h,17", (("G", -1000.0, ("Host", "0")), "h")),
        ("G.Percent:1,5|#Level:Host|#hostname:h,17", None),
        ("warning: no driver", None),
    ],
)
def test_a_command_says_its_metrics_in_torchserves_form(line: str, expected: object) -> None:
    assert parse(line) == expected


@pytest.mark.asyncio
async def test_a_command_takes_the_place_of_the_look(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = tmp_path / "mine.py"
    script.write_text(
        "import sys\n"
        "print('CPUUtilization.Percent:' + sys.argv[1] + '|#Level:Host|#hostname:there,timestamp:17')\n"
        "print('nonsense')\n"
        "print()\n"
        "print('4711:1000')\n"  # a worker's memory, as TorchServe's own script prints it
    )
    metrics = Metrics(hostname="here")
    done = asyncio.Event()
    system = metrics.system

    def seen(name: str, value: float, values: tuple[str, ...], hostname: str = "") -> None:
        system(name, value, values, hostname)
        done.set()

    metrics.system = seen  # type: ignore[method-assign, assignment]
    watch = SystemMetrics(metrics, 60.0, f"{script} 42", False, os.environ)
    watch.start()
    await asyncio.wait_for(done.wait(), 30)
    await watch.stop()
    assert 'CPUUtilization{Level="Host",Hostname="there",} 42.0' in metrics.text()
    assert "MemoryUsed{" not in metrics.text()


@pytest.mark.asyncio
async def test_a_command_that_fails_is_told_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    watch = SystemMetrics(Metrics(), 60.0, "/nonexistent.py", False, os.environ)
    await watch._look(0.0)
    assert "system_metrics_cmd: " in caplog.text
    assert "/nonexistent.py" in caplog.text
