"""Hub names against a small hub on loopback: what is fetched, kept, and told when it goes wrong."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from mv2v_engine.checkpoints import inspect_checkpoint, load_checkpoint
from mv2v_engine.checkpoints.fetch import fetch_components, fetch_file
from mv2v_engine.checkpoints.hub import HubName, _opened, hub_name
from mv2v_engine.envs import child_environment
from mv2v_engine.errors import CheckpointError, StorageError
from tests.checkpoints.small_hub import COMMIT, SmallHub, ask_at
from tests.checkpoints.test_components import folder, wans_own, write
from tests.checkpoints.test_gguf import write_gguf

State = dict[str, Tensor]
CAMERAS = "kling/ReCamMaster"
WAN = "wan/Wan2.1-T2V"


@pytest.fixture
def cameras(hub: SmallHub, recammaster: State) -> Path:
    """A repository of one file, beside things that nobody needs."""
    root = hub.root / CAMERAS
    path = write(root / "step20000.ckpt", recammaster)
    (root / "README.md").write_text("a card")
    (root / "teaser.mp4").write_bytes(bytes(5000))
    return path


@pytest.fixture
def wan_repository(hub: SmallHub, wan: State) -> Path:
    """Wan's own layout, with pictures and another kind of model beside it."""
    root = hub.root / WAN
    wans_own(root)
    (root / "google/umt5-xxl/spiece.model").write_bytes(bytes(range(256)) * 20)
    write(root / "models_clip_open-clip.pth", {"a": torch.ones(2000)})
    write(root / "diffusion_pytorch_model.safetensors", wan)
    (root / "config.json").write_text('{"_class_name": "WanModel", "num_layers": 3}')
    (root / "assets").mkdir()
    (root / "assets/logo.png").write_bytes(bytes(9000))
    return root


def kept(tmp_path: Path) -> list[str]:
    """Whatever the cache has besides its locks: names, and contents by their kind."""
    cache = tmp_path / "cache"
    names = (path.relative_to(cache) for path in cache.rglob("*") if not path.is_dir())
    return sorted(str(name) for name in names if ".locks" not in name.parts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b", HubName("a/b")),
        ("KlingTeam/ReCamMaster-Wan2.1", HubName("KlingTeam/ReCamMaster-Wan2.1")),
        ("a/b@v1.0", HubName("a/b", "v1.0")),
        ("a/b:c/d.ckpt", HubName("a/b", "main", "c/d.ckpt")),
        ("a/b@refs/pr/3:c", HubName("a/b", "refs/pr/3", "c")),
        (Path("a/b:transformer/"), HubName("a/b", "main", "transformer")),
        ("tiny-nvs", None),
        ("a/b/c", None),
        ("/a/b", None),
        ("./a/b", None),
        ("a/b.safetensors", None),
        ("a/b:../c", None),
        ("a/b--c", None),
        ("a/b@", None),
    ],
)
def test_names(text: str | Path, expected: HubName | None) -> None:
    assert hub_name(text) == expected
    assert expected is None or hub_name(str(expected)) == expected


def test_a_checkpoint_is_fetched_by_its_name(
    hub: SmallHub, cameras: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = load_checkpoint(CAMERAS)
    local = load_checkpoint(cameras)
    assert loaded.name == "ReCamMaster" and loaded.format == "recammaster"
    for (name, mine), (_, theirs) in zip(
        loaded.transformer.named_parameters(), local.transformer.named_parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    # neither the card nor the teaser
    assert hub.fetched() == [f"{CAMERAS}/step20000.ckpt"]
    assert f"models--kling--ReCamMaster/snapshots/{COMMIT}/step20000.ckpt" in kept(tmp_path)
    said = capfd.readouterr().err
    assert re.search(r"commit 01234567\): fetching 1 file, 2\.7\d MB, .* licence: apache-2.0", said)
    # once is enough
    hub.asked.clear()
    load_checkpoint(f"{CAMERAS}:step20000.ckpt")
    assert not hub.asked and not capfd.readouterr().err


def test_a_revision_is_one_of_the_repository(hub: SmallHub, cameras: Path, tmp_path: Path) -> None:
    load_checkpoint(f"{CAMERAS}@v1:step20000.ckpt")
    assert ("GET", f"/api/models/{CAMERAS}/revision/v1", "") in hub.asked
    assert (tmp_path / "cache/models--kling--ReCamMaster/refs/v1").read_text() == COMMIT
    with pytest.raises(CheckpointError, match=r"has no revision 'v2'; expected a branch, a tag"):
        load_checkpoint(f"{CAMERAS}@v2")


def test_only_what_is_needed_is_fetched(hub: SmallHub, wan_repository: Path) -> None:
    loaded = load_checkpoint(WAN, with_components=False)
    assert loaded.vae_path is None
    assert hub.fetched() == [f"{WAN}/diffusion_pytorch_model.safetensors"]
    hub.asked.clear()
    loaded = load_checkpoint(WAN)
    assert loaded.vae_path is not None and loaded.vae_path.name == "Wan2.1_VAE.pth"
    assert loaded.text_path is not None and loaded.tokenizer_path is not None
    names = [name.removeprefix(f"{WAN}/") for name in hub.fetched()]
    assert sorted(names) == [
        "Wan2.1_VAE.pth",
        "google/umt5-xxl/spiece.model",
        "models_t5_umt5-xxl-enc-bf16.pth",
    ]


def test_components_without_their_transformer(hub: SmallHub, wan_repository: Path) -> None:
    found = fetch_components(Path(WAN))
    assert [path.name for path in (found.text_encoder, found.tokenizer) if path] == [
        "models_t5_umt5-xxl-enc-bf16.pth",
        "umt5-xxl",
    ]
    assert f"{WAN}/diffusion_pytorch_model.safetensors" not in hub.fetched()
    assert len(hub.fetched()) == 3


def test_a_diffusers_repository(hub: SmallHub, wan: State, renamed: Callable[[str], str]) -> None:
    root = hub.root / "wan/diffusers"
    folder(
        root,
        '{"_class_name": "W", "transformer": ["d", "WanTransformer3DModel"]}',
        "model_index.json",
    )
    state = {renamed(key): value for key, value in wan.items()}
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    keys = sorted(state)
    weight_map = {key: shards[i % 2] for i, key in enumerate(keys)}
    for shard in shards:
        part = {key: state[key] for key in keys if weight_map[key] == shard}
        write(root / "transformer" / shard, part)
    index = '{"weight_map": {' + ", ".join(f'"{k}": "{v}"' for k, v in weight_map.items()) + "}}"
    folder(root / "transformer", index, "diffusion_pytorch_model.safetensors.index.json")
    folder(root / "transformer", '{"_class_name": "WanTransformer3DModel"}')
    folder(root / "vae", '{"_class_name": "AutoencoderKLWan"}')
    for name in ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16"):
        write(root / f"vae/{name}.safetensors", {"conv2.weight": torch.ones(2000)})
    folder(root / "text_encoder", '{"architectures": ["UMT5EncoderModel"]}')
    for name in ("model.safetensors", "pytorch_model.bin"):
        write(root / "text_encoder" / name, {"a": torch.ones(2000)})
    folder(root / "tokenizer", "{}", "tokenizer_config.json")
    write(root / "image_encoder/model.safetensors", {"a": torch.ones(2000)})
    loaded = load_checkpoint("wan/diffusers")
    assert loaded.name == "diffusers" and loaded.format == "wan_diffusers"
    assert sorted(name.removeprefix("wan/diffusers/") for name in hub.fetched()) == [
        "text_encoder/model.safetensors",
        *(f"transformer/{shard}" for shard in shards),
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_inspect_reads_headers_alone(hub: SmallHub, wan_repository: Path, tmp_path: Path) -> None:
    found = inspect_checkpoint(WAN)
    local = inspect_checkpoint(wan_repository)
    assert found.problem is None and found.path == Path(WAN)
    assert found.sentence == local.sentence and found.num_bytes == local.num_bytes
    assert found.vae_path == Path("Wan2.1_VAE.pth")
    assert not hub.fetched()
    assert not [name for name in kept(tmp_path) if name.endswith((".pth", ".safetensors"))]
    deep = inspect_checkpoint(WAN, deep=True)
    assert deep.numbers is not None and len(deep.numbers) == 3


def test_a_header_larger_than_most(hub: SmallHub, recammaster: State, tmp_path: Path) -> None:
    """Both kinds: a trainer's notes in the pickle, and metadata in front of the tensors."""
    notes = "".join(chr(48 + i % 64) for i in range(3_000_000))
    root = hub.root / "big/headers"
    root.mkdir(parents=True)
    torch.save({"state_dict": recammaster, "notes": notes}, root / "notes.ckpt")
    save_file(recammaster, str(root / "notes.safetensors"), {"notes": notes})
    for name in ("notes.ckpt", "notes.safetensors"):
        found = inspect_checkpoint(f"big/headers:{name}")
        assert found.problem is None and found.format == "recammaster"
    assert not hub.fetched()


def test_what_is_refused_is_not_fetched(hub: SmallHub, wan: State, tmp_path: Path) -> None:
    write(hub.root / "wan/i2v/model.safetensors", wan | {"img_emb.proj.0.weight": torch.ones(2000)})
    with pytest.raises(CheckpointError, match=r"^wan/i2v is a image-to-video checkpoint; expected"):
        load_checkpoint("wan/i2v")
    for name in ("a", "b"):
        write(hub.root / f"wan/two/{name}.safetensors", wan)
    with pytest.raises(CheckpointError, match=r"^wan/two holds several weight files \(a\.s.*them"):
        load_checkpoint("wan/two")
    write(hub.root / "wan/short/model.safetensors", dict(list(wan.items())[:-4]))
    with pytest.raises(CheckpointError, match=r"^wan/short lacks 4 parameters"):
        load_checkpoint("wan/short")
    (hub.root / "wan/none").mkdir()
    (hub.root / "wan/none/README.md").write_text("nothing yet")
    with pytest.raises(CheckpointError, match=r"^wan/none holds no transformer weights \(found"):
        load_checkpoint("wan/none")
    with pytest.raises(CheckpointError, match=r"^wan/two lacks a VAE: .*give a folder with all"):
        fetch_components("wan/two")
    assert not hub.fetched() and not kept(tmp_path)


def test_a_single_file(hub: SmallHub, cameras: Path) -> None:
    assert fetch_file(CAMERAS).read_bytes() == cameras.read_bytes()
    assert fetch_file(f"{CAMERAS}:step20000.ckpt").name == "step20000.ckpt"
    assert fetch_file(cameras) == cameras
    write(cameras.parent / "other.ckpt", {"a": torch.ones(2)})
    _opened.cache_clear()
    with pytest.raises(CheckpointError, match=r"holds 2 weight files \(other\.ckpt, step20000"):
        fetch_file(CAMERAS)


def test_an_interrupted_transfer_is_taken_up(
    hub: SmallHub, cameras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import file_download

    name, size = f"{CAMERAS}/step20000.ckpt", cameras.stat().st_size
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)

    def interrupted(_: float) -> None:
        """Ctrl-C, in the pause before the library tries again."""
        raise KeyboardInterrupt

    hub.cut[name] = size // 2
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(file_download.time, "sleep", interrupted)
        fetch_file(CAMERAS)
    (partial,) = kept(tmp_path)
    done = (tmp_path / "cache" / partial).stat().st_size
    assert partial.endswith(".incomplete") and 0 < done <= size // 2
    # and the next transfer breaks off too, behind where it begins; this time nobody interrupts
    hub.cut[name] = size // 4
    hub.asked.clear()
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    assert fetch_file(CAMERAS).read_bytes() == cameras.read_bytes()
    parts = [part for _, path, part in hub.asked if path == f"/content/{name}"]
    assert parts[0] == f"bytes={done}-" and len(parts) == 2
    assert not [path for path in kept(tmp_path) if path.endswith(".incomplete")]


def test_a_wrong_digest_leaves_nothing(hub: SmallHub, cameras: Path, tmp_path: Path) -> None:
    hub.swapped.add(f"{CAMERAS}/step20000.ckpt")
    said = r"step20000.ckpt of kling/ReCamMaster came with SHA-256 \w{64}, expected \w{64}, and was"
    with pytest.raises(CheckpointError, match=said):
        fetch_file(CAMERAS)
    assert kept(tmp_path) == []
    hub.swapped.clear()
    assert fetch_file(CAMERAS).is_file()


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model.gguf"])
def test_digests_are_compared_before_a_header_is_judged(
    hub: SmallHub, wan: State, tmp_path: Path, name: str
) -> None:
    """What came wrong is no damaged file of the hub's, for a look as for a load."""
    place = hub.root / "wan/whole" / name
    if name.endswith(".gguf"):
        place.parent.mkdir(parents=True)
        write_gguf(place, wan)
    else:
        write(place, wan)
    hub.swapped.add(f"wan/whole/{name}")
    for ask in (inspect_checkpoint, load_checkpoint):
        said = rf"^{name} of wan/whole came with SHA-256 \w{{64}}, expected \w{{64}}, and was"
        with pytest.raises(CheckpointError, match=said):
            ask("wan/whole")
        assert kept(tmp_path) == []
    hub.swapped.clear()
    assert load_checkpoint("wan/whole").format == "wan_original"
    # a file that the hub itself lists so is what its header says
    place.write_bytes(place.read_bytes()[::-1])
    _opened.cache_clear()
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(CheckpointError, match=rf"^wan/whole/{name} is (truncated|no weight)"):
        load_checkpoint("wan/whole")


def test_a_full_disk_is_told_before(
    hub: SmallHub, cameras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(StorageError, match=r"needs 2\.7\d MB more .* where 1 MB are free; m"):
        load_checkpoint(CAMERAS)
    assert not hub.fetched() and kept(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="a disk that is full at once")
def test_a_disk_that_fills_meanwhile_keeps_nothing(
    hub: SmallHub, cameras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.file_download as library

    def filling(url: str, out: BinaryIO, **_: object) -> None:
        out.write(b"some")
        with open("/dev/full", "wb") as full:
            full.write(b"more")

    monkeypatch.setattr(library, "http_get", filling)
    with pytest.raises(StorageError, match=r"No space left on device; nothing unfinished was le"):
        fetch_file(CAMERAS)
    assert kept(tmp_path) == []


def test_a_gated_repository(
    hub: SmallHub, cameras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated.add(CAMERAS)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    said = rf"kling/ReCamMaster is gated, no token was given; accept its licence at {hub.address}/k"
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(CAMERAS)
    assert kept(tmp_path) == []
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
    assert load_checkpoint(CAMERAS).name == "ReCamMaster"


def test_what_does_not_exist(hub: SmallHub, cameras: Path) -> None:
    said = rf"nobody/nothing is neither a file or folder here nor a repository of {hub.address}, or"
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint("nobody/nothing")
    with pytest.raises(CheckpointError, match=r"holds no step2000\.ckpt at main .*step20000\.ckpt"):
        load_checkpoint(f"{CAMERAS}:step2000.ckpt")


def test_who_comes_second_waits(hub: SmallHub, cameras: Path) -> None:
    """The processes of a torchrun do so, which all load the same checkpoint."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(fetch_file, [CAMERAS] * 4))
    assert {path.read_bytes() for path in found} == {cameras.read_bytes()}
    assert len(hub.fetched()) == 1


@pytest.mark.parametrize("address", ["http://127.0.0.1:{port}/page", "nowhere"])
def test_an_endpoint_that_is_no_hub(
    hub: SmallHub, cameras: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    ask_at(monkeypatch, address.format(port=hub.address.rpartition(":")[2]))
    with pytest.raises(CheckpointError, match=r"HF_ENDPOINT|HF_TOKEN") as caught:
        load_checkpoint(CAMERAS)
    assert "\n" not in str(caught.value)


def test_no_network(
    hub: SmallHub,
    cameras: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    address = hub.address
    ask_at(monkeypatch, "http://127.0.0.1:9")
    said = (
        r"not a file or folder here, and http://127\.0\.0\.1:9 cannot be reached .*; check the net"
    )
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(CAMERAS)
    ask_at(monkeypatch, address)
    load_checkpoint(CAMERAS)
    ask_at(monkeypatch, "http://127.0.0.1:9")
    _opened.cache_clear()
    capfd.readouterr()
    assert load_checkpoint(CAMERAS).name == "ReCamMaster"
    assert "going on with commit 01234567 of the cache" in capfd.readouterr().err


def test_a_path_wins_over_a_name(
    hub: SmallHub,
    cameras: Path,
    recammaster: State,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    load_checkpoint(CAMERAS)
    local = write(tmp_path / CAMERAS / "mine.ckpt", recammaster)
    hub.asked.clear()
    capfd.readouterr()
    assert load_checkpoint(CAMERAS).report.path == Path(CAMERAS)
    said = capfd.readouterr().err
    assert f"{CAMERAS} is the one in this folder; {CAMERAS}@main is the hub's" in said
    assert not hub.asked and local.is_file()
    assert "snapshots" in str(load_checkpoint(f"{CAMERAS}@main").report.path)


def test_offline(
    hub: SmallHub, cameras: Path, wan_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspect_checkpoint(WAN)  # fetches no more than the JSON
    load_checkpoint(f"{WAN}@v1", with_components=False)
    _opened.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE forbids"):
        load_checkpoint(WAN)
    with pytest.raises(
        CheckpointError, match=r"lacks a VAE.*; this is what the cache has, the hub"
    ):
        fetch_components(f"{WAN}@v1")
    with pytest.raises(
        CheckpointError, match=r"HF_HUB_OFFLINE forbids .* has no whole copy; unset"
    ):
        load_checkpoint(CAMERAS)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    load_checkpoint(CAMERAS)
    _opened.cache_clear()
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_checkpoint(CAMERAS).name == "ReCamMaster"
    assert not hub.asked


def test_the_librarys_variables(hub: SmallHub, cameras: Path, tmp_path: Path) -> None:
    """On the command line, in a process of its own: the library reads them when it is imported."""
    hub.gated.add(CAMERAS)
    home = tmp_path / "home"
    done = subprocess.run(
        [sys.executable, "-m", "mv2v_engine.run", "inspect", CAMERAS, "--deep"],
        env=child_environment(HF_ENDPOINT=hub.address, HF_HOME=str(home), HF_TOKEN="hf_mine"),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "is a ReCamMaster transformer" in done.stdout
    assert (home / f"hub/models--kling--ReCamMaster/snapshots/{COMMIT}/step20000.ckpt").is_file()
