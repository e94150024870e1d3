"""Weight files: what loads, and what each kind of bad file is told."""

import argparse
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

from ssmamba_models.engine.weights import find_weights, load_weights, read_weights, weights_sha256

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def model(seed=0, name="test_ssmamba", **options):
    torch.manual_seed(seed)
    return timm.create_model(name, **options)


def equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.fixture(scope="module")
def trained():
    """A classifier of three classes; not to be altered."""
    return model(seed=7, num_classes=3)


@pytest.fixture
def file(trained, tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(trained.state_dict(), path, {"model": "test_ssmamba", "img_size": "64"})
    return path


class TestWhatLoads:
    def test_a_safetensors_file_with_its_metadata(self, trained, file):
        state, metadata = read_weights(file)
        assert equal(state, trained.state_dict())
        assert metadata == {"model": "test_ssmamba", "img_size": "64"}

    def test_a_run_folder(self, file):
        file.rename(file.with_name("weights.safetensors"))
        assert find_weights(file.parent) == file.with_name("weights.safetensors")
        assert load_weights(model(), file.parent)["img_size"] == "64"

    @pytest.mark.parametrize("suffix", ["pth", "pt", "bin"])
    @pytest.mark.parametrize("wrap", [None, "state_dict", "model", "state_dict_ema", "model_ema"])
    def test_a_pickle_of_tensors_alone(self, trained, tmp_path, suffix, wrap):
        state = {f"module._orig_mod.{name}": value for name, value in trained.state_dict().items()}
        checkpoint = {wrap: state, "epoch": 3, "args": argparse.Namespace(lr=1.0)} if wrap else state
        torch.save(checkpoint, tmp_path / f"m.{suffix}")
        read, metadata = read_weights(tmp_path / f"m.{suffix}")
        assert equal(read, trained.state_dict())
        assert metadata == {}

    def test_averaged_weights_before_the_last_ones(self, trained, tmp_path):
        torch.save({"state_dict": model().state_dict(), "state_dict_ema": trained.state_dict()}, tmp_path / "m.pth")
        assert equal(read_weights(tmp_path / "m.pth")[0], trained.state_dict())

    def test_bfloat16_files_into_a_float32_model(self, trained, tmp_path):
        half = {name: value.bfloat16() for name, value in trained.state_dict().items()}
        save_file(half, tmp_path / "m.safetensors")
        target = model(num_classes=3)
        load_weights(target, tmp_path / "m.safetensors", classifier="keep")
        assert equal(target.state_dict(), {name: value.float() for name, value in half.items()})

    def test_a_classifier_is_dropped_and_the_models_own_is_left(self, trained, file):
        for classes in (0, 3, 5):
            target = model(num_classes=classes)
            own = {name: value.clone() for name, value in target.state_dict().items() if name.startswith("head.fc")}
            load_weights(target, file)
            state = target.state_dict()
            assert torch.equal(state["stem.conv1.weight"], trained.state_dict()["stem.conv1.weight"])
            assert all(torch.equal(state[name], own[name]) for name in own)

    def test_an_encoder_alone_into_a_classifier(self, tmp_path):
        save_file(model(seed=7, num_classes=0).state_dict(), tmp_path / "m.safetensors")
        target = model(num_classes=5)
        load_weights(target, tmp_path / "m.safetensors")
        assert weights_sha256(target) != weights_sha256(model(num_classes=5))

    def test_a_classifier_is_kept(self, trained, file):
        target = model(num_classes=3)
        load_weights(target, file, classifier="keep")
        assert weights_sha256(target) == weights_sha256(trained)

    def test_any_timm_model(self, tmp_path):
        vit = model(seed=7, name="test_vit", num_classes=4)
        torch.save(vit.state_dict(), tmp_path / "m.pth")
        target = model(name="test_vit", num_classes=0)
        load_weights(target, tmp_path / "m.pth")
        assert torch.equal(target.pos_embed, vit.pos_embed)

    def test_weights_whose_metadata_name_a_tag_or_a_repository(self, trained, tmp_path):
        for name in ("test_ssmamba.some_tag", "hf-hub:someone/something"):
            save_file(trained.state_dict(), tmp_path / "m.safetensors", {"model": name})
            target = model()
            load_weights(target, tmp_path / "m.safetensors")
            assert torch.equal(target.stem.conv1.weight, trained.stem.conv1.weight), name


class TestBadFiles:
    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no\.pth' does not exist; expected a weight file or a run folder"):
            find_weights(tmp_path / "no.pth")

    def test_a_folder_without_weights(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"holds no weights\.safetensors: it is no run folder, or its run"):
            load_weights(model(), tmp_path)

    @pytest.mark.parametrize("name", ["m.pth", "m.safetensors"])
    def test_empty(self, tmp_path, name):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"{name}' is empty"):
            read_weights(tmp_path / name)

    @pytest.mark.parametrize("name", ["m.pth", "m.safetensors"])
    def test_not_a_weight_file(self, tmp_path, name):
        (tmp_path / name).write_text("hello, this is a text")
        with pytest.raises(ValueError, match=f"{name}' is not a safe weight file"):
            read_weights(tmp_path / name)

    @pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99])
    def test_truncated_safetensors(self, file, share):
        whole = file.read_bytes()
        file.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match=r"m\.safetensors' is not a safe weight file: truncated.*again"):
            read_weights(file)

    @pytest.mark.parametrize("share", [0.001, 0.5, 0.99])
    def test_truncated_pth(self, trained, tmp_path, share):
        torch.save(trained.state_dict(), tmp_path / "m.pth")
        whole = (tmp_path / "m.pth").read_bytes()
        (tmp_path / "m.pth").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match="not a safe weight file"):
            read_weights(tmp_path / "m.pth")

    @pytest.mark.parametrize("checkpoint", [{"epoch": 3}, [1, 2], {}, {"state_dict": {}}, {3: torch.ones(1)}])
    def test_no_tensors(self, tmp_path, checkpoint):
        torch.save(checkpoint, tmp_path / "m.pth")
        with pytest.raises(ValueError, match="no state dict"):
            read_weights(tmp_path / "m.pth")


class TestCodeIsNotRun:
    """Each file would create another one, if what it holds were run."""

    @pytest.fixture
    def trap(self, tmp_path):
        return tmp_path / "trap"

    @pytest.fixture
    def evil(self, trap):
        class Evil:
            def __reduce__(self):
                return exec, (f"open({str(trap)!r}, 'w').close()",)

        return Evil()

    def test_the_trap_works(self, trap, evil):
        pickle.loads(pickle.dumps(evil))
        assert trap.exists()

    @pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "safetensors"])
    @pytest.mark.parametrize("write", ["zip", "legacy", "plain pickle"])
    def test_in_every_container(self, tmp_path, trap, evil, suffix, write):
        path = tmp_path / f"m.{suffix}"
        checkpoint = {"state_dict": {"weight": torch.ones(2)}, "optimizer": evil}
        if write == "plain pickle":
            path.write_bytes(pickle.dumps(evil))
        else:
            torch.save(checkpoint, path, _use_new_zipfile_serialization=write == "zip")
        with pytest.raises(ValueError, match="not a safe weight file") as error:
            read_weights(path)
        assert not trap.exists()
        assert "weights_only" not in str(error.value)

    def test_not_even_where_the_environment_asks_for_it(self, tmp_path, trap, evil, monkeypatch):
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        torch.save({"state_dict": evil}, tmp_path / "m.pth")
        with pytest.raises(ValueError, match="not a safe weight file"):
            load_weights(model(), tmp_path / "m.pth")
        assert not trap.exists()


class TestMisfits:
    """The message names what differs, and the model is left as it was."""

    def refuse(self, path, match, target=None, **options):
        target = target or model(num_classes=0)
        before = weights_sha256(target)
        with pytest.raises(ValueError, match=match):
            load_weights(target, path, **options)
        assert weights_sha256(target) == before

    def test_another_width_that_the_file_names(self, tmp_path):
        tiny = timm.create_model("ssmamba_tiny")
        save_file(tiny.state_dict(), tmp_path / "m.safetensors", {"model": "ssmamba_tiny"})
        match = (
            r"m\.safetensors' are of ssmamba_tiny \(384 features\) and do not fit test_ssmamba \(48\): tensors "
            r"\d+ unexpected \(first: stages\.\S+\), \d+ of another shape "
            r"\(first: stem\.conv1\.weight: \(24, 3, 3, 3\), expected \(8, 3, 3, 3\)\); create ssmamba_tiny"
        )
        self.refuse(tmp_path / "m.safetensors", match)

    def test_another_width_without_metadata(self, tmp_path):
        torch.save(timm.create_model("ssmamba_tiny").state_dict(), tmp_path / "m.pth")
        self.refuse(tmp_path / "m.pth", r"are of another model \(384 features\) and do not fit test_ssmamba \(48\)")

    def test_another_architecture(self, tmp_path):
        torch.save(model(name="test_vit").state_dict(), tmp_path / "m.pth")
        self.refuse(
            tmp_path / "m.pth",
            r"are of another model and do not fit test_ssmamba: tensors \d+ missing \(first: stem\.conv1\.weight\), "
            r"\d+ unexpected \(first: cls_token\)",
        )

    def test_ours_into_another_architecture(self, file):
        self.refuse(file, r"are of test_ssmamba .*do not fit test_vit.*missing", target=model(name="test_vit"))

    def test_metadata_that_say_another_model(self, trained, tmp_path):
        path = tmp_path / "m.safetensors"
        save_file(trained.state_dict(), path, {"model": "ssmamba_small.some_tag"})
        self.refuse(path, r"are of ssmamba_small and do not fit test_ssmamba; create ssmamba_small")

    def test_one_tensor_missing(self, trained, tmp_path):
        state = trained.state_dict()
        del state["stem.norm2.bias"]
        save_file(state, tmp_path / "m.safetensors")
        self.refuse(tmp_path / "m.safetensors", r"tensors 1 missing \(first: stem\.norm2\.bias\);")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, trained, tmp_path, value):
        state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
        state["stem.norm2.bias"][3] = value
        save_file(state, tmp_path / "m.safetensors")
        self.refuse(tmp_path / "m.safetensors", r"m\.safetensors' are not finite \(first: stem\.norm2\.bias\).*earlier")

    def test_a_kept_classifier_of_other_classes(self, file):
        match = r"1 of another shape \(first: head\.fc\.weight: \(3, 48\)|2 of another shape \(first: head\.fc\.weight"
        self.refuse(file, match, target=model(num_classes=5), classifier="keep")
        self.refuse(file, r"2 unexpected \(first: head\.fc", target=model(num_classes=0), classifier="keep")

    def test_a_training_state_names_the_run(self, trained, tmp_path):
        (tmp_path / "checkpoints").mkdir()
        path = tmp_path / "checkpoints" / "step-00000001.pt"
        torch.save({"model": {**trained.state_dict(), "decoder.weight": torch.ones(1)}}, path)
        self.refuse(path, r"1 unexpected \(first: decoder\.weight\); a run's weights.*name of its folder")

    def test_what_to_do_with_the_classifier(self, file):
        self.refuse(file, 'classifier is "?\'?ignore.*expected "drop" or "keep"', classifier="ignore")


def test_the_hash_sees_names_values_shapes_and_types():
    def digest(**tensors):
        module = torch.nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return weights_sha256(module)

    base = digest(a=torch.zeros(4), b=torch.ones(2))
    assert base == digest(b=torch.ones(2), a=torch.zeros(4))
    assert base == digest(a=torch.zeros(8)[::2], b=torch.ones(2))
    others = [
        digest(a=torch.zeros(4), c=torch.ones(2)),
        digest(a=torch.zeros(2, 2), b=torch.ones(2)),
        digest(a=torch.zeros(4, dtype=torch.int32), b=torch.ones(2)),
        digest(a=torch.zeros(4), b=torch.ones(2) * 2),
        digest(a=torch.zeros(4).bfloat16(), b=torch.ones(2)),
    ]
    assert len({base, *others}) == 6
