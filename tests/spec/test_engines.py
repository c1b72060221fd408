"""Which engines fit what is there, and what is said where none does."""

from __future__ import annotations

import dataclasses

import pytest

from nuwa.spec.engines import (
    ENGINES,
    RECORD,
    RECORD_VERSION,
    EngineKey,
    EngineRecord,
    find_engines,
    misfit,
    widest_sort,
)
from nuwa.spec.manifest import BundleError

KEY = EngineKey("tensorrt", "11.4.0.106", ("sm_90",), 1, "ab" * 32, "NVIDIA H200")
MADE = EngineRecord(KEY, 8, (1, 16, 64), False, {"decoder_step.engine": "cd" * 32}, "2026-11-21")
HERE = KEY  # what the machine has


def made(**changed) -> EngineRecord:
    """MADE with other fields; those of its key too."""
    keys = {field.name for field in dataclasses.fields(EngineKey)}
    key = dataclasses.replace(KEY, **{k: v for k, v in changed.items() if k in keys})
    rest = {k: v for k, v in changed.items() if k not in keys}
    return dataclasses.replace(MADE, key=key, **rest)


def write(bundle, record: EngineRecord) -> None:
    folder = bundle / ENGINES / record.key.name
    folder.mkdir(parents=True)
    (folder / RECORD).write_text(record.to_json())


def test_a_record_reads_back_as_it_was():
    assert EngineRecord.from_json(MADE.to_json()) == MADE
    assert KEY.name == "tensorrt-11.4.0.106-sm_90-nvidia_h200-plugin1-abababababab"
    functions = made(plugin_abi=None, targets=("sm_86", "sm_89"), runtime="tensorrt-rtx", gpu="")
    assert EngineRecord.from_json(functions.to_json()) == functions
    assert functions.key.name == "tensorrt-rtx-11.4.0.106-sm_86+sm_89-functions-abababababab"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"runtime": "tensorrt-rtx"}, "for tensorrt-rtx"),
        ({"graphs": "00" * 32}, "of other graphs than this bundle's"),
        ({"version": "11.3.0.1"}, "built with tensorrt 11.3.0.1, and this is 11.4.0.106"),
        ({"version": "10.14.1.48", "version_compatible": True}, "built with tensorrt 10.14"),
        ({"version": "11.5.0.0", "version_compatible": True}, "built with tensorrt 11.5.0.0"),
        ({"targets": ("sm_86", "sm_89")}, "for sm_86, sm_89, and this GPU is sm_90"),
        ({"gpu": "NVIDIA H100 PCIe"}, "for NVIDIA H100 PCIe, and this is NVIDIA H200"),
        ({"gpu": ""}, "for no known GPU, and this is NVIDIA H200"),
        ({"plugin_abi": 2}, "for version 2 of the plugin library, and this is 1"),
        ({"slots": 1}, "for 1 slots, not 8"),
    ],
)
def test_engines_for_something_else_are_refused(tmp_path, change, reason):
    record = made(**change)
    assert misfit(record, HERE, 8).startswith(reason)
    write(tmp_path, record)
    with pytest.raises(BundleError) as raised:
        find_engines(tmp_path, HERE, 8)
    text = str(raised.value)
    assert f"({record.key.name} is not it: {reason}" in text
    assert "no engines for tensorrt 11.4.0.106 on NVIDIA H200 with 8 slots" in text


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"targets": ("sm_80", "sm_90")},
        {"plugin_abi": None},
        {"version": "11.1.0.5", "version_compatible": True},
    ],
)
def test_engines_that_fit_are_found(tmp_path, change):
    record = made(**change)
    write(tmp_path, made(slots=3, targets=("sm_90", "sm_100")))
    write(tmp_path, record)
    assert find_engines(tmp_path, HERE, 8) == (tmp_path / ENGINES / record.key.name, record)


def test_engines_with_the_plugin_are_preferred(tmp_path):
    write(tmp_path, made(plugin_abi=None))
    write(tmp_path, MADE)
    assert find_engines(tmp_path, HERE, 8)[1] == MADE
    without = dataclasses.replace(HERE, plugin_abi=None)
    assert find_engines(tmp_path, without, 8)[1].key.plugin_abi is None


@pytest.mark.parametrize(
    ("wanted", "options"),
    [
        (HERE, "--runtime tensorrt --slots 8 --plugins"),
        (dataclasses.replace(HERE, plugin_abi=None), "--runtime tensorrt --slots 8"),
        (
            EngineKey("tensorrt-rtx", "1.7.1.116", ("sm_89",), None, "ab" * 32),
            "--runtime tensorrt-rtx --target sm_89 --slots 8",
        ),
    ],
)
def test_what_is_told_to_do_builds_what_is_wanted(tmp_path, wanted, options):
    with pytest.raises(BundleError) as raised:
        find_engines(tmp_path, wanted, 8)
    words = f"nuwa build-engines {tmp_path} {options}"
    assert str(raised.value).endswith(f"build them with `{words}`")


def test_no_more_is_sorted_than_a_topk_can():
    assert widest_sort(1024) == 1024
    assert widest_sort(12288) == 3840


def test_no_engines_and_bad_records_are_told(tmp_path):
    with pytest.raises(BundleError, match="there are none at all"):
        find_engines(tmp_path, HERE, 8)
    later = MADE.to_json().replace(f'"record_version": {RECORD_VERSION}', '"record_version": 9')
    for text, says in ((later, "record has version 9, this is 1"), ("{", "cannot be read")):
        folder = tmp_path / ENGINES / "x"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(text)
        with pytest.raises(BundleError, match=f"x is not it: its {says}|its record {says}"):
            find_engines(tmp_path, HERE, 8)
