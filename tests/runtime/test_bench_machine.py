"""What is told of a machine: made-up files of a PC, a container and a Jetson, a made-up NVML."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path, PurePosixPath
from types import ModuleType, SimpleNamespace

import pytest

from nuwa.runtime.bench import energy, machine, memory, sensors
from nuwa.runtime.bench.hardware import Hardware, gpus_in_use
from nuwa.runtime.bench.machine import describe
from nuwa.runtime.bench.memory import device_peak, peak_memory
from nuwa.runtime.bench.sampler import Sampler, between

CPUINFO = """\
processor\t: 0
model name\t: Some CPU @ 3.00GHz
cpu MHz\t\t: 2999.5
flags\t\t: fpu avx2 avx512f avx512_vnni

processor\t: 1
model name\t: Some CPU @ 3.00GHz
flags\t\t: fpu
"""
PC = {
    "/proc/cpuinfo": CPUINFO,
    "/proc/meminfo": "MemTotal:       16000000 kB\nMemFree: 3 kB",
    "/proc/self/status": "VmPeak: 9 kB\nVmHWM:\t    2048 kB\nVmRSS: 7 kB",
    "/proc/self/cgroup": "0::/user.slice/job.scope",
    "/etc/os-release": 'NAME="Some"\nPRETTY_NAME="Some Linux 1 (one)"',
    "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave",
    "/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1000000",
    "/sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2000000",
    **{
        f"/sys/devices/system/cpu/cpu{cpu}/cache/index{index}/{name}": value
        for cpu in range(4)
        for index, values in {
            2: {"level": "2", "size": "512K", "shared_cpu_list": str(cpu)},
            3: {"level": "3", "size": "16M", "shared_cpu_list": "0-1" if cpu < 2 else "2-3"},
        }.items()
        for name, value in values.items()
    },
}
JETSON = {
    "/proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit",
    "/proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp",
    "/etc/nv_tegra_release": "# R36 (release), REVISION: 4.0\nmore",
    "/sys/class/devfreq/17000000.gpu/cur_freq": "624750000",
    "/sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "/sys/class/thermal/thermal_zone0/temp": "48500",
    **{
        f"/sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/{name}": value
        for name, value in {
            "in1_label": "VDD_IN",
            "in1_input": "5000",
            "curr1_input": "1200",
            "in2_label": "NC",
            "in2_input": "0",
            "curr2_input": "0",
            "in7_label": "sum of shunt voltages",
            "in7_input": "1",
        }.items()
    },
}


class FakeHardware(Hardware):
    """Files by path, and answers of commands by their first word."""

    def __init__(self, files: dict[str, str], answers: dict[str, str] | None = None, nvml=None):
        self.files, self.answers = dict(files), answers or {}
        self.nvml, self.switches = nvml, None

    def involuntary_switches(self) -> float | None:
        return self.switches

    def text(self, path: str) -> str | None:
        return self.files.get(path)

    def paths(self, pattern: str) -> list[str]:
        there = {PurePosixPath(file) for file in self.files}
        there |= set(itertools.chain.from_iterable(file.parents for file in list(there)))
        return sorted(str(path) for path in there if path.match(pattern))

    def answer(self, *command: str) -> str | None:
        return self.answers.get(command[0])


class FakeNvml(SimpleNamespace):
    """Two GPUs; the second tells its name and its memory only. Energy rises by 1500 mJ a look."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self):
        self.millijoules = 7000
        self.reasons = 0x1
        self.clocks = itertools.cycle([1800, 1200, 1500])

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlSystemGetDriverVersion(self):
        return b"570.10"

    def nvmlSystemGetCudaDriverVersion_v2(self):
        return 12080

    def nvmlDeviceGetUUID(self, gpu):
        return ("GPU-aa11", b"GPU-bb22")[gpu]

    def nvmlDeviceGetName(self, gpu):
        return ("GPU One", b"GPU Two")[gpu]

    def nvmlDeviceGetMemoryInfo(self, gpu):
        return SimpleNamespace(total=80 << 30, used=3 << 30)

    def nvmlDeviceGetClockInfo(self, gpu, kind):
        self._only_first(gpu)
        return next(self.clocks) if kind == 1 else 2600

    def nvmlDeviceGetMaxClockInfo(self, gpu, kind):
        self._only_first(gpu)
        return 1980 if kind == 1 else 2619

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu):
        self._only_first(gpu)
        return 700_000

    def nvmlDeviceGetPowerUsage(self, gpu):
        self._only_first(gpu)
        return 123_456

    def nvmlDeviceGetPersistenceMode(self, gpu):
        self._only_first(gpu)
        return 1

    def nvmlDeviceGetTemperature(self, gpu, sensor):
        self._only_first(gpu)
        return 61

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu):  # an older NVML: no event reasons
        self._only_first(gpu)
        return self.reasons

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):
        self._only_first(gpu)
        self.millijoules += 1500
        return self.millijoules

    def nvmlDeviceGetComputeRunningProcesses(self, gpu):
        self._only_first(gpu)
        return [
            SimpleNamespace(pid=-1, usedGpuMemory=5),
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=1 << 30),
        ]

    def _only_first(self, gpu):
        if gpu:
            raise self.NVMLError("not supported")


def test_a_pc():
    told = describe(FakeHardware(PC))
    assert told["processor"] == "Some CPU @ 3.00GHz"
    assert told["instruction_sets"] == ["AVX2", "AVX-512", "VNNI"]
    assert told["last_level_cache_bytes"] == 2 * 16 << 20, "two caches of 16 MiB"
    assert told["memory_bytes"] == 16000000 * 1024
    assert told["governor"] == "powersave"
    assert told["cpu_mhz"] == 1500.0
    assert told["os"] == "Some Linux 1 (one)"
    assert told["machine_cores"] == os.cpu_count()
    assert told["cores"] == machine.usable_cores() >= 1
    assert (told["gpus"], told["jetson"], told["board"]) == ([], None, None)
    assert told["date"].endswith("+00:00")
    json.dumps(told)


def test_a_machine_that_tells_nothing():
    told = describe(FakeHardware({}))
    assert told["processor"]
    unknown = ("cpu_quota_cores", "last_level_cache_bytes", "memory_bytes", "governor", "cpu_mhz")
    assert [told[name] for name in unknown] == [None] * len(unknown)
    assert peak_memory(FakeHardware({}))["peak_process_bytes"] > 1 << 20, "the system's own word"
    sampler = Sampler(FakeHardware({}))
    sampler.start()
    summary = sampler.stop()
    assert (summary["seen"], summary["energy"], summary["throttled"]) == ({}, [], [])


def test_this_machine():
    told = describe()
    assert told["processor"]
    assert {"python", "numpy", "onnxruntime", "nuwa_runtime", "kernel"} <= set(told)
    json.dumps(told)


@pytest.mark.parametrize(
    "files, quota",
    [
        ({}, None),
        ({"/sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({"/sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        (
            {
                "/sys/fs/cgroup/user.slice/job.scope/cpu.max": "400000 100000",
                "/sys/fs/cgroup/user.slice/cpu.max": "200000 100000",
            },
            2.0,
        ),
        (
            {
                "/proc/self/cgroup": "4:memory:/a\n1:cpu,cpuacct:/docker/abc\n0::/",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            0.5,
        ),
        (
            {
                "/proc/self/cgroup": "1:cpu:/",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
    ],
)
def test_the_least_quota_of_control_groups_counts(files, quota):
    assert describe(FakeHardware(PC | files))["cpu_quota_cores"] == quota


def test_gpus_tell_what_they_can():
    first, second = describe(FakeHardware(PC, nvml=FakeNvml()))["gpus"]
    assert first == {
        "name": "GPU One",
        "driver": "570.10",
        "cuda": "12.8",
        "memory_bytes": 80 << 30,
        "power_limit_watts": 700.0,
        "persistence_mode": True,
        "sm_mhz": 1800,
        "memory_mhz": 2600,
        "most_sm_mhz": 1980,
        "most_memory_mhz": 2619,
        "throttle_reasons": ["idle"],
    }
    assert second["name"] == "GPU Two"
    assert (second["sm_mhz"], second["power_limit_watts"], second["persistence_mode"]) == (
        None,
        None,
        None,
    )


def test_a_driver_that_is_lost_is_no_gpu():
    nvml = FakeNvml()

    def lost():
        raise nvml.NVMLError("GPU is lost")

    nvml.nvmlDeviceGetCount = lost
    assert describe(FakeHardware({}, nvml=nvml))["gpus"] == []


def test_peak_memory_of_process_and_gpus():
    assert peak_memory(FakeHardware(PC, nvml=FakeNvml())) == {
        "peak_process_bytes": 2048 * 1024,
        "gpus": [
            {"gpu": 0, "process_bytes": 1 << 30, "used_bytes": 3 << 30},
            {"gpu": 1, "process_bytes": None, "used_bytes": 3 << 30},
        ],
    }


def test_without_pynvml_or_a_driver_there_are_no_gpus(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Hardware().gpus == []
    without_driver = ModuleType("pynvml")
    without_driver.NVMLError = FakeNvml.NVMLError

    def fail():
        raise FakeNvml.NVMLError("no driver")

    without_driver.nvmlInit = fail
    monkeypatch.setitem(sys.modules, "pynvml", without_driver)
    assert Hardware().gpus == []


def test_files_and_commands_that_are_not_there(tmp_path: Path):
    hardware = Hardware()
    (tmp_path / "model").write_bytes(b"Some Board\0")
    assert hardware.text(str(tmp_path / "model")) == "Some Board"
    assert hardware.text(str(tmp_path / "none")) is None
    assert hardware.text(str(tmp_path)) is None
    assert hardware.paths(str(tmp_path / "mod*")) == [str(tmp_path / "model")]
    assert hardware.answer(sys.executable, "-c", "print('yes')") == "yes"
    assert hardware.answer(sys.executable, "-c", "raise SystemExit(1)") is None
    assert hardware.answer("/no/such/command") is None


def test_a_jetson():
    told = describe(FakeHardware(JETSON, {"nvpmodel": "NV Power Mode: MAXN\n0"}))
    assert told["board"] == "NVIDIA Jetson Orin Nano Developer Kit"
    assert told["instruction_sets"] == ["NEON", "dot product"]
    assert told["jetson"] == {
        "release": "# R36 (release), REVISION: 4.0",
        "power_mode": "MAXN",
        "rails_watts": {"VDD_IN": pytest.approx(6.0)},
    }


@pytest.mark.parametrize(
    "files, mode",
    [
        ({}, None),
        ({"/var/lib/nvpmodel/status": "pmode:0002"}, "2"),
        ({"/etc/nvpmodel.conf": "< PM_CONFIG DEFAULT=1 >\n< POWER_MODEL ID=1 NAME=7W >"}, "7W"),
        (
            {
                "/var/lib/nvpmodel/status": "pmode:0000",
                "/etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< PM_CONFIG DEFAULT=1 >",
            },
            "15W",
        ),
    ],
)
def test_the_power_mode_where_nvpmodel_cannot_be_asked(files, mode):
    assert describe(FakeHardware(JETSON | files))["jetson"]["power_mode"] == mode


def test_rails_of_older_kernels():
    folder = "/sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    files = {f"{folder}/rail_name_0": "POM_5V_IN", f"{folder}/in_power0_input": "2500"}
    (rail,) = energy.rails(FakeHardware(files)).items()
    assert (rail[0], rail[1]()) == ("POM_5V_IN", 2.5)


def test_the_sampler_sums_up_what_gpus_did():
    nvml = FakeNvml()
    sampler = Sampler(FakeHardware(PC, nvml=nvml), hertz=0.01)
    sampler.start()
    nvml.reasons = 0x4 | 0x20
    summary = sampler.stop()
    assert summary["looks"] == 2
    assert summary["energy"] == [
        {"of": "GPU board energy (NVML)", "gpu": 0, "joules": pytest.approx(1.5)}
    ]
    assert sampler.energy(0.0, 1e-9)[0]["joules"] == 0, "before it looked"
    assert summary["throttled"] == ["GPU 0: software power cap", "GPU 0: software thermal slowdown"]
    seen = summary["seen"]
    assert seen["gpu0_sm_mhz"] == {"least": 1200, "median": 1500, "most": 1800}
    assert seen["gpu0_watts"]["median"] == pytest.approx(123.456)
    assert seen["gpu0_process_bytes"]["most"] == 1 << 30
    assert seen["cpu_mhz"]["median"] == 1500.0
    assert "gpu1_sm_mhz" not in seen
    json.dumps(summary)


def test_the_sampler_looks_as_often_as_it_is_told():
    sampler = Sampler(FakeHardware(JETSON), hertz=200)
    sampler.start()
    time.sleep(0.1)
    summary = sampler.stop()
    assert 2 <= summary["looks"] <= 200 * summary["seconds"] + 2
    assert summary["seconds"] >= 0.1 and summary["seconds"] > summary["own_seconds"] > 0
    assert summary["seen"]["cpu_celsius"]["most"] == pytest.approx(48.5)
    assert summary["seen"]["17000000.gpu_mhz"]["least"] == pytest.approx(624.75)
    (energy,) = summary["energy"]
    assert energy["of"] == "rail VDD_IN (INA3221, sampled)"
    assert 6.0 * 0.1 <= energy["joules"] <= 6.0 * summary["seconds"]


def test_throttling_that_is_counted():
    stat, heat = (
        "/sys/fs/cgroup/user.slice/job.scope/cpu.stat",
        "/sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count",
    )
    hardware = FakeHardware(PC | {stat: "nr_periods 9\nnr_throttled 4", heat: "7"})
    sampler = Sampler(hardware)
    sampler.start()
    hardware.files[stat] = "nr_periods 12\nnr_throttled 6"
    assert sampler.stop()["throttled"] == ["container CPU quota"]
    sampler = Sampler(hardware)
    sampler.start()
    hardware.files[heat] = "8"
    assert sampler.stop()["throttled"] == ["CPU core heat"]


def test_a_sensor_that_goes_away_is_left_out():
    hardware = FakeHardware(JETSON)
    sampler = Sampler(hardware)
    hardware.files.clear()
    sampler.start()
    assert sampler.stop()["seen"] == {}


def test_temperature_of_pcs_comes_from_their_driver():
    folder = "/sys/class/hwmon/hwmon2"
    hardware = FakeHardware({f"{folder}/name": "k10temp", f"{folder}/temp1_input": "55000"})
    sampler = Sampler(hardware)
    sampler.start()
    assert sampler.stop()["seen"]["cpu_celsius"]["median"] == 55.0


@pytest.mark.parametrize("hertz", [0, -1])
def test_a_sampler_must_look(hertz):
    with pytest.raises(ValueError, match="is not positive"):
        Sampler(FakeHardware({}), hertz=hertz)


class Clock:
    """time.perf_counter that tests set."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_what_was_counted_in_a_span():
    series = [(10.0, 5.0), (12.0, 9.0), (14.0, 9.0)]
    assert between(series, 10.0, 14.0) == 4.0
    assert between(series, 11.0, 13.0) == 2.0
    assert between(series, 0.0, 10.0) == 0.0
    assert between(series[:1], 0.0, 20.0) is None


def test_energy_is_that_of_a_span(monkeypatch):
    """Six watts, of which the span has two seconds; the look before it does not count."""
    clock, hardware = Clock(monkeypatch), FakeHardware(JETSON)
    sampler = Sampler(hardware, hertz=1e-3)
    sampler._began = clock.now
    sampler._counted = {}
    for clock.now in (100.0, 103.0, 105.0, 109.0):
        sampler._look()
    (spent,) = sampler.energy(103.0, 105.0)
    assert spent == {"of": "rail VDD_IN (INA3221, sampled)", "joules": pytest.approx(12.0)}
    assert sampler.energy(100.0, 109.0)[0]["joules"] == pytest.approx(54.0)


def test_processor_packages_count_up_and_begin_again():
    folder = f"{energy.RAPL}/intel-rapl:0"
    files = {
        f"{folder}/name": "package-0",
        f"{folder}/energy_uj": "9000000",
        f"{folder}/max_energy_range_uj": "10000000",
        f"{energy.RAPL}/intel-rapl:0:0/name": "core",
        f"{energy.RAPL}/intel-rapl:0:0/energy_uj": "1",
    }
    hardware = FakeHardware(files)
    (source,) = energy.sources(hardware, [])
    assert source.of == "processor package energy (RAPL), package-0"
    before = source.joules()
    hardware.files[f"{folder}/energy_uj"] = "500000"
    assert source.joules() - before == pytest.approx(1.5)
    assert energy.idle_watts([source], 0.01) == {source.of: 0.0}
    assert energy.idle_watts([], 99.0) == {}


def test_of_all_energy_one_kind_is_charged():
    board = {"of": energy.BOARD_ENERGY, "gpu": 1, "joules": 7.0}
    package = {"of": f"{energy.PACKAGE_ENERGY}, package-0", "joules": 5.0}
    rail, part = (
        {"of": energy.RAIL_ENERGY.format(name), "joules": joules}
        for name, joules in (("VDD_IN", 3.0), ("VDD_SOC", 1.0))
    )
    assert energy.counted([rail, board, package]) == {"of": energy.BOARD_ENERGY, "joules": 7.0}
    assert energy.counted([package, part, rail]) == {"of": rail["of"], "joules": 3.0}
    assert energy.counted([package, part])["joules"] == 1.0
    assert energy.counted([package])["joules"] == 5.0
    assert energy.counted([]) is None


def test_the_gpu_in_use():
    nvml = FakeNvml()
    gpus = FakeHardware({}, nvml=nvml).gpus

    def chosen(backend="onnxruntime-cuda", **environment):
        return [gpu.index for gpu in gpus_in_use(gpus, backend, environment)]

    assert chosen(CUDA_VISIBLE_DEVICES="1") == [0], "this process is there"
    nvml.nvmlDeviceGetComputeRunningProcesses = lambda gpu: []
    assert chosen(CUDA_VISIBLE_DEVICES="1,0") == [1]
    assert chosen(CUDA_VISIBLE_DEVICES="GPU-bb22") == [1]
    assert chosen() == [0]
    assert chosen("native-cpu") == []
    assert gpus_in_use([], "tensorrt", {}) == []
    sampler = Sampler(FakeHardware({}, nvml=nvml), hertz=0.01, gpus=gpus[1:])
    sampler.start()
    assert {name[:4] for name in sampler.stop()["seen"]} == {"gpu1"}


def test_what_others_take_of_the_cores(monkeypatch):
    monkeypatch.setattr(machine, "usable_core_numbers", lambda: {0, 1})
    monkeypatch.setattr(sensors, "usable_core_numbers", lambda: {0, 1})

    def files(busy: int, own: int, stolen: int) -> dict[str, str]:
        line = f"{busy} 0 0 0 9 0 0 {stolen} 0 0"
        fields = ["S", *["0"] * 10, str(own), "0", "0", "0", "0"]
        return {
            "/proc/stat": f"cpu  1 1 1 1 1 1 1 1\ncpu0 {line}\ncpu1 {line}\ncpu7 {line}\nintr 5",
            "/proc/self/stat": f"1 (a b) c) {' '.join(fields)}",
        }

    clock, hardware = Clock(monkeypatch), FakeHardware(files(100, 50, 0))
    hardware.switches = 10.0
    sampler = Sampler(hardware, hertz=1e-3)
    sampler._look()
    hardware.files |= files(100 + 700, 50 + 1000, 100)  # each of two cores: 7 s, 1 s stolen
    hardware.switches = 30.0
    clock.now += 10.0
    sampler._look()
    assert sampler.contention(100.0, 110.0) == {
        "others_cores": pytest.approx(0.4),
        "stolen_cores": pytest.approx(0.2),
        "others_share": pytest.approx(0.3),
        "involuntary_switches_per_second": pytest.approx(2.0),
    }
    assert Sampler(FakeHardware(PC)).contention(0.0, 1.0) == {}
    assert {sensors.BUSY, sensors.OWN} <= set(sensors.processor_time(Hardware())) or not Path(
        "/proc/stat"
    ).exists()


def test_temperatures_of_a_jetson(monkeypatch):
    zone = "/sys/class/thermal/thermal_zone"
    kinds = ("CPU-therm", "GPU-therm", "tj-thermal", "soc0-thermal", "PMIC-Die", "x86_pkg_temp")
    files = {f"{zone}{i}/type": kind for i, kind in enumerate(kinds)}
    files |= {f"{zone}{i}/temp": str(40000 + 1000 * i) for i in range(len(kinds))}
    hardware = FakeHardware(files)
    assert sensors.temperatures(hardware) == {
        "cpu_celsius": f"{zone}0/temp",
        "gpu_celsius": f"{zone}1/temp",
        "tj_celsius": f"{zone}2/temp",
        "soc0_celsius": f"{zone}3/temp",
    }
    assert sensors.hottest(hardware) == 43.0
    sampler = Sampler(hardware, hertz=1e-3)
    sampler._look()
    hardware.files[f"{zone}2/temp"] = "70000"
    sampler.start()
    seen = sampler.stop()["seen"]["tj_celsius"]
    assert (seen["first"], seen["last"], seen["most"]) == (42.0, 70.0, 70.0)


def test_device_memory_where_nvml_knows_this_process_by_another_number():
    hardware = FakeHardware({}, nvml=FakeNvml())
    gpus = hardware.gpus[1:]
    assert memory.used_on_devices(hardware) == {0: 3 << 30, 1: 3 << 30}
    seen = {"gpu1_used_bytes": {"most": 5 << 30}}
    most, note = device_peak(seen, gpus, {1: 3 << 30})
    assert most == 2 << 30 and "before the model was loaded" in note
    most, note = device_peak(seen, gpus)
    assert most == 5 << 30 and "all processes" in note
    assert device_peak(seen | {"gpu1_process_bytes": {"most": 9}}, gpus) == (9, None)
    assert device_peak({}, gpus) == (None, None)
    assert device_peak(seen, []) == (None, None)


def test_free_memory_is_that_of_the_control_group():
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   4096 kB"}
    assert machine.available_bytes(FakeHardware(files)) == 4 << 20
    group = {
        "/proc/self/cgroup": "0::/",
        "/sys/fs/cgroup/memory.max": "3000000",
        "/sys/fs/cgroup/memory.current": "1000000",
    }
    assert machine.available_bytes(FakeHardware(files | group)) == 2_000_000
    assert machine.available_bytes(FakeHardware({})) is None
