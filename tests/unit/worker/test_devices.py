import sys
from types import SimpleNamespace

import pytest

from minserve.config.model import ModelConfig, ParallelType
from minserve.config.yaml import YamlDocument
from minserve.worker.devices import (
    DeviceAllocator,
    Devices,
    Inventory,
    NoDevicesError,
    check_devices,
    read_inventory,
    visible_devices,
)

UUIDS = tuple(f"GPU-{index:08x}-aaaa" for index in range(8))
EIGHT = Inventory(tuple("01234567"))

PLAIN = ModelConfig()
TP4 = ModelConfig(parallel_type=ParallelType.TP, parallel_level=4)
TP2 = ModelConfig(parallel_type=ParallelType.TP, parallel_level=2)
PP1 = ModelConfig(parallel_type=ParallelType.PP, parallel_level=1)
CUSTOM = ModelConfig(parallel_type=ParallelType.CUSTOM)
CUSTOM2 = ModelConfig(parallel_type=ParallelType.CUSTOM, parallel_level=2)


def on(config: ModelConfig, *ids: int) -> ModelConfig:
    return config.model_copy(update={"device_ids": ids})


def on_cpu(config: ModelConfig) -> ModelConfig:
    return config.model_copy(update={"device_type": "cpu"})


def reserve(allocator: DeviceAllocator, owner: str, config: ModelConfig) -> str | None:
    return allocator.reserve(owner, config, config.world_size(8)).mask


@pytest.mark.parametrize(
    ("inventory", "configs", "masks"),
    [
        (EIGHT, [TP4, TP4], ["0,1,2,3", "4,5,6,7"]),
        (EIGHT, [PLAIN] * 3, ["0", "1", "2"]),
        (EIGHT, [PLAIN] * 9, ["0", "1", "2", "3", "4", "5", "6", "7", "0"]),
        (EIGHT, [CUSTOM, PLAIN], ["0", "1"]),
        (EIGHT, [CUSTOM2, CUSTOM2], ["0,1", "2,3"]),
        (EIGHT, [PP1, PP1, PLAIN], ["0", "1", "2"]),
        (EIGHT, [TP4, PLAIN, PLAIN], ["0,1,2,3", "4", "5"]),
        (EIGHT, [PLAIN, PLAIN, TP4], ["0", "1", "2,3,4,5"]),
        (EIGHT, [PLAIN, TP4, TP4, TP2], ["0", "1,2,3,4", NoDevicesError, "5,6"]),
        (
            EIGHT,
            [on(PLAIN, 0), on(TP2, 0, 1), on(CUSTOM2, 0, 1), on(PLAIN, 0)],
            ["0", NoDevicesError, NoDevicesError, "0"],
        ),
        (EIGHT, [TP4, TP4, PLAIN], ["0,1,2,3", "4,5,6,7", NoDevicesError]),
        (EIGHT, [*[PLAIN] * 5, TP4, TP2, PLAIN], ["0", "1", "2", "3", "4", NoDevicesError, "5,6", "7"]),
        (EIGHT, [on(TP2, 6, 3, 5), on(TP2, 6, 3, 5)], ["6,3", NoDevicesError]),
        (EIGHT, [on(PLAIN, 3, 1)] * 3, ["1", "3", "1"]),
        (EIGHT, [on(TP2, 0, 9)], [NoDevicesError]),
        (EIGHT, [on_cpu(TP4), on_cpu(PLAIN)], [None, None]),
        (Inventory(), [TP4, PLAIN, CUSTOM2], [None, None, None]),
        (Inventory(tuple("4567")), [TP2, on(TP2, 2, 3)], ["4,5", "6,7"]),
        (Inventory(UUIDS[2:4]), [TP2], [f"{UUIDS[2]},{UUIDS[3]}"]),
        (Inventory(("MIG-a", "MIG-b")), [PLAIN, PLAIN], ["MIG-a", "MIG-b"]),
    ],
)
def test_masks(
    inventory: Inventory, configs: list[ModelConfig], masks: list[str | type[NoDevicesError] | None]
) -> None:
    allocator = DeviceAllocator(inventory)
    for number, (config, mask) in enumerate(zip(configs, masks, strict=True)):
        if mask is NoDevicesError:
            with pytest.raises(NoDevicesError):
                reserve(allocator, f"w{number}", config)
        else:
            assert reserve(allocator, f"w{number}", config) == mask


def test_ids_index_the_inventory() -> None:
    allocator = DeviceAllocator(Inventory(tuple("4567")))
    assert allocator.reserve("w", on(TP2, 3, 1), 2) == Devices("7,5", (3, 1))


def test_released_devices_are_given_again() -> None:
    allocator = DeviceAllocator(EIGHT)
    reserve(allocator, "a", TP4)
    reserve(allocator, "b", TP4)
    allocator.release("a")
    allocator.release("a")
    assert reserve(allocator, "c", TP2) == "0,1"
    assert reserve(allocator, "d", PLAIN) == "2"


def test_a_shared_device_is_nobodys_to_own_until_its_last_user_has_left() -> None:
    allocator = DeviceAllocator(Inventory(("0", "1")))
    for owner in "abc":
        reserve(allocator, owner, on(PLAIN, 0))
    for owner in "abc":
        with pytest.raises(NoDevicesError, match="group needs 2 device\\(s\\), 1 of 2 are free; "):
            reserve(allocator, "group", TP2)
        allocator.release(owner)
    assert reserve(allocator, "group", TP2) == "0,1"


def test_an_owner_keeps_what_it_holds() -> None:
    allocator = DeviceAllocator(EIGHT)
    for _ in range(3):
        assert reserve(allocator, "a", TP4) == "0,1,2,3"
        assert reserve(allocator, "b", PLAIN) == "4"


def test_workers_that_left_make_room_for_the_next() -> None:
    allocator = DeviceAllocator(Inventory(("0", "1", "2")))
    for owner in "abc":
        reserve(allocator, owner, PLAIN)
    allocator.release("b")
    assert reserve(allocator, "d", PLAIN) == "1"


def test_the_error_names_the_worker_the_need_and_the_holders() -> None:
    allocator = DeviceAllocator(EIGHT)
    reserve(allocator, "first/1.0/0", TP4)
    reserve(allocator, "second/1.0/0", CUSTOM2)
    with pytest.raises(NoDevicesError) as caught:
        reserve(allocator, "third/1.0/0", TP4)
    assert str(caught.value) == (
        "third/1.0/0 needs 4 device(s), 2 of 8 are free; first/1.0/0 owns 0, 1, 2, 3; second/1.0/0 owns 4, 5"
    )


@pytest.mark.parametrize(
    ("variable", "visible"),
    [
        (None, "0 1 2 3 4 5 6 7"),
        ("", ""),
        ("-1", ""),
        ("none", ""),
        ("4,5,6,7", "4 5 6 7"),
        (" 3 , 1 ", "3 1"),
        ("0,8,1", "0"),
        ("0,-1,1", "0"),
        ("0,,1", "0"),
        ("2,2", ""),
        (f"{UUIDS[5]},{UUIDS[0]}", f"{UUIDS[5]} {UUIDS[0]}"),
        ("GPU-00000003,GPU-ffffffff,GPU-00000001", "GPU-00000003"),
        ("GPU-0000", ""),  # the beginning of several
        ("MIG-GPU-x/1/0,MIG-y", "MIG-GPU-x/1/0 MIG-y"),
    ],
)
def test_an_inherited_mask_is_read_as_cuda_reads_it(variable: str | None, visible: str) -> None:
    assert visible_devices(UUIDS, variable) == tuple(visible.split())


def test_without_a_gpu_a_mask_shows_nothing() -> None:
    assert visible_devices((), None) == visible_devices((), "0") == visible_devices((), "MIG-a") == ()


def fake_nvml(**functions: object) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: 8,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetUUID": lambda handle: UUIDS[handle],
            **functions,
        }
    )


def test_the_inventory_is_what_nvml_sees_through_the_inherited_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    assert read_inventory({}) == EIGHT
    assert read_inventory({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}) == Inventory(tuple("4567"))
    assert read_inventory({"CUDA_VISIBLE_DEVICES": ""}) == Inventory()


def broken() -> None:
    raise OSError("no driver")


@pytest.mark.parametrize("module", [None, fake_nvml(nvmlInit=broken), fake_nvml(nvmlDeviceGetCount=broken)])
def test_without_a_driver_or_its_library_the_inventory_is_empty(
    module: SimpleNamespace | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)  # None: the import fails
    assert read_inventory({}) == Inventory()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PLAIN, ""),
        (on(PLAIN, 7), ""),
        (TP4, ""),
        (TP4.model_copy(update={"min_workers": 2}), ""),
        (PLAIN.model_copy(update={"min_workers": 20}), ""),
        (on_cpu(on(TP4, 9)), ""),
        (on(TP4, 0, 9), "3: deviceIds: found 9, of 8 visible device(s), allowed: ids from 0 to 7"),
        (on(TP4, 0, 1), "3: deviceIds: found 2 id(s) for 1 worker(s) of 4 device(s) each, allowed: at least 4 ids"),
        (
            TP4.model_copy(update={"parallel_level": 16}),
            '2: parallelType: found "tp" with 1 worker(s) of 16 device(s) each, allowed: at most 8 device(s) in all',
        ),
        (
            TP4.model_copy(update={"min_workers": 3}),
            '2: parallelType: found "tp" with 3 worker(s) of 4 device(s) each, allowed: at most 8 device(s) in all',
        ),
        (
            CUSTOM2.model_copy(update={"parallel_level": 9}),
            '2: parallelType: found "custom" with 1 worker(s) of 9 device(s) each, allowed: at most 8 device(s) in all',
        ),
    ],
)
def test_contradictions_with_the_devices_there_are(config: ModelConfig, message: str) -> None:
    document = YamlDocument("model-config.yaml", {}, {(): 1, ("parallelType",): 2, ("deviceIds",): 3})
    problems = check_devices(config, config.world_size(8), EIGHT, document)
    assert [str(problem)[: len(f"model-config.yaml:{message}")] for problem in problems] == (
        [f"model-config.yaml:{message}"] if message else []
    )
    assert check_devices(config, config.world_size(8), Inventory(), document) == ()


def test_the_first_of_an_inventory() -> None:
    inventory = Inventory(("3", "1"))
    assert inventory.first(None) == inventory.first(9) == inventory
    assert inventory.first(1) == Inventory(("3",))
    assert inventory.first(0) == Inventory()
