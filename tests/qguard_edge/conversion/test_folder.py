"""Folders for bitsandbytes: what was planned is what a user's `from_pretrained` gets."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from convert import bnb_layout
from convert.atomic import OutputError
from qguard_edge.conversion.dry_run import dry_run
from qguard_edge.conversion.outputs import folder as folder_output
from qguard_edge.conversion.report import FolderReport
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import (
    DefenseOptions,
    FlipGuardOptions,
    NoiseOptions,
    NoneOptions,
    OrthoOptions,
    QuantGuardOptions,
    QVecOptions,
)
from qguard_edge.runtimes.hf import HfLoadError
from quant_grids.bnb import bnb_grid
from quant_grids.errors import FormatError, UnsupportedError
from tests.helpers.command import CommandLine
from tests.helpers.folder_requests import load, opened, request

DEFENSES: list[DefenseOptions] = [NoneOptions(), OrthoOptions(), FlipGuardOptions(), QVecOptions(), NoiseOptions()]
PROMPT = torch.tensor([[5, 77, 130, 9, 201, 33, 64, 12]])


@pytest.fixture(scope="module")
def wide_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in f32, with weights that bf16 could not hold: dequantized weights are exactly what a plan says."""
    folder = tmp_path_factory.mktemp("wide") / "wide"
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-4)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    return folder


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Every weight of a model in f32, dequantized by bitsandbytes; nothing has been run yet."""
    made = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None:
            continue
        if type(module).__name__ == "Linear4bit":
            weight.quant_state.dtype = torch.float32
            made[name] = bnb.dequantize_4bit(weight.data, weight.quant_state)
        elif type(module).__name__ == "Linear8bitLt":
            made[name] = bnb.int8_vectorwise_dequant(weight.data, weight.SCB)
        else:
            made[name] = weight.detach().float()
    return made


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        made: torch.Tensor = model(input_ids=PROMPT).logits
        return made


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("to", ["nf4", "fp4"])
def test_no_defense_is_what_bitsandbytes_writes(wide_folder: Path, tmp_path: Path, to: str, double_quant: bool) -> None:
    """Byte for byte: transformers quantizes and saves, we write, the tensors are the same."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=to, bnb_4bit_use_double_quant=double_quant)
    load(wide_folder, quantization_config=settings).save_pretrained(tmp_path / "theirs")
    convert_model(request(wide_folder, tmp_path / "ours", to, NoneOptions(), double_quant=double_quant))
    assert_same_tensors(tmp_path)


def test_no_defense_is_what_bitsandbytes_writes_in_int8(wide_folder: Path, tmp_path: Path) -> None:
    load(wide_folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True)).save_pretrained(tmp_path / "theirs")
    convert_model(request(wide_folder, tmp_path / "ours", "int8", NoneOptions()))
    assert_same_tensors(tmp_path)


def assert_same_tensors(folder: Path) -> None:
    theirs = load_file(folder / "theirs" / "model.safetensors")
    ours = load_file(folder / "ours" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype, name
        assert torch.equal(tensor, ours[name]), name
    configs = [json.loads((folder / name / "config.json").read_text())["quantization_config"] for name in ("theirs", "ours")]
    differing = {key for key in configs[0] if configs[0][key] != configs[1].get(key)}
    assert differing <= {"bnb_4bit_compute_dtype"}
    assert configs[0].keys() == configs[1].keys()


@pytest.mark.parametrize("defense", DEFENSES, ids=lambda defense: defense.label)
@pytest.mark.parametrize("to", ["nf4", "fp4", "int8"])
def test_the_loaded_model_is_the_plan(
    wide_folder: Path, tmp_path: Path, to: str, defense: DefenseOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loads without a warning; its weights are the planned levels exactly, and so are its logits."""
    planned = spy_on_plans(monkeypatch)
    report = convert_model(request(wide_folder, tmp_path / "out", to, defense, double_quant=to == "nf4"))
    check_report(report, defense)
    model, warned = load_and_listen(tmp_path / "out")
    assert warned == []
    found = weights_of(model)
    assert len(planned) == 14
    for name, values in planned.items():
        assert torch.equal(found[name.removesuffix(".weight")], values), name
    reference = load(wide_folder, dtype=torch.float32)
    for name, values in planned.items():
        reference.get_parameter(name).data = values
    if to == "int8":
        # INT8 also rounds activations: the peer is bitsandbytes' own model of the planned levels, which it keeps as they are.
        reference.save_pretrained(tmp_path / "levels")
        reference = load(tmp_path / "levels", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert torch.equal(logits(model), logits(reference))


def spy_on_plans(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Note the levels of every matrix that is handed to the writer."""
    planned: dict[str, torch.Tensor] = {}
    real = bnb_layout.stored_tensors

    def note(name: str, grid: Any, blocks: torch.Tensor, shape: tuple[int, int], *rest: Any) -> dict[str, torch.Tensor]:
        planned[name] = grid.dequantize(blocks).reshape(-1)[: shape[0] * shape[1]].view(shape)
        return real(name, grid, blocks, shape, *rest)

    monkeypatch.setattr(folder_output, "stored_tensors", note)
    return planned


def load_and_listen(folder: Path) -> tuple[Any, list[str]]:
    """The model, and every warning that loading it caused."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    ear, root = Ear(logging.WARNING), logging.getLogger("transformers")
    root.addHandler(ear)
    try:
        return load(folder), heard
    finally:
        root.removeHandler(ear)


def test_the_ear_hears(wide_folder: Path, tmp_path: Path) -> None:
    """A folder with a tensor missing does cause a warning, so that silence above means something."""
    convert_model(request(wide_folder, tmp_path / "out", "nf4"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    assert load_and_listen(tmp_path / "out")[1] != []


def check_report(report: FolderReport, defense: DefenseOptions) -> None:
    changed = sum(rounding.outcome.n_changed for rounding in report.roundings)
    assert (changed == 0) == (defense.name == "none")
    if defense.name == "ortho":
        assert max(abs(rounding.outcome.alignment) for rounding in report.roundings) < 0.02
    assert report.warnings == ()
    assert report.kept_tensors == 7  # embeddings, output head, five norms


def test_bfloat16_and_what_else_is_in_the_folder(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = convert_model(request(tiny_folder, out, "nf4", shard_bytes=200_000, check_loads=True))
    assert report.loaded is not None
    assert report.loaded.tokens
    names = {path.name for path in out.iterdir()}
    assert {"README.md", "qguard.json", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert "model.safetensors.index.json" in names
    model = load(out)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert type(model.lm_head) is torch.nn.Linear
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in out.iterdir())
    text = (out / "README.md").read_text() + (out / "qguard.json").read_text() + (out / "config.json").read_text()
    assert str(tmp_path) not in text
    assert str(tiny_folder) not in text
    record = json.loads((out / "qguard.json").read_text())
    assert record["seed"] == "3"
    assert set(record["sha256"]) == {"base"} | {name for name in names if name.endswith(".safetensors")}
    assert abs(record["formats"]["nf4"]["alignment"]) < 0.02
    ids = AutoTokenizer.from_pretrained(out)("The quick brown fox")["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(tiny_folder)("The quick brown fox")["input_ids"]


def test_same_seed_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    first, again = (convert_model(request(tiny_folder, tmp_path / name, "nf4")) for name in "ab")
    other = convert_model(request(tiny_folder, tmp_path / "c", "nf4", seed=4, threads=1))
    single = convert_model(request(tiny_folder, tmp_path / "d", "nf4", threads=1))
    key = "model.safetensors"
    assert first.hashes[key] == again.hashes[key] == single.hashes[key] != other.hashes[key]


@pytest.mark.parametrize("base_type", [None, "f32", "f16"])
def test_a_moved_folder_is_rounded_to_the_plan_by_bitsandbytes(
    tiny_folder: Path, tmp_path: Path, base_type: str | None
) -> None:
    """`--to hf --target all`: checked here by loading the folder as a user does, for all three formats."""
    out = tmp_path / "out"
    report = convert_model(request(tiny_folder, out, "hf", base_type=base_type, check_loads=True))
    shares = {}
    for kind in report.kinds:
        mine = [rounding for rounding in report.roundings if rounding.kind == kind]
        weights = sum(rounding.n_weights for rounding in mine)
        shares[kind] = sum(rounding.reproduced or 0 for rounding in mine) / weights
    assert set(shares) == {"nf4", "fp4", "int8"}
    assert min(shares.values()) >= 0.999
    assert report.warnings == ()
    stored = load_file(out / "model.safetensors")
    names = {rounding.name for rounding in report.roundings}
    for kind in report.kinds:
        model = load(out, quantization_config=settings_of(kind))
        found = weights_of(model)
        changed = {rounding.name: rounding.outcome.n_changed for rounding in report.roundings if rounding.kind == kind}
        plain = load_file(tiny_folder / "model.safetensors")
        for name in names:
            grid = bnb_grid(kind, stored[name].shape[1])
            # What a user gets is what the check saw: bitsandbytes' rounding of the stored weights.
            blocks = grid.quantize(stored[name])
            assert torch.equal(found[name.removesuffix(".weight")], grid.dequantize(blocks).view(stored[name].shape)), name
            before = grid.quantize(plain[name].to(stored[name].dtype))
            assert grid.changed_codes(before, blocks)[0] == pytest.approx(changed[name], abs=0.001 * stored[name].numel())
    # In full precision it is still the model that it was.
    full, original = load(out, dtype=torch.float32), load(tiny_folder, dtype=torch.float32)
    difference = torch.nn.functional.kl_div(
        logits(full).log_softmax(-1), logits(original).log_softmax(-1), log_target=True, reduction="none"
    )
    assert float(difference.sum(-1).mean()) < 0.05


def settings_of(kind: str) -> BitsAndBytesConfig:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind)


def test_moving_for_a_requantizing_defense_says_what_it_does(tiny_folder: Path, tmp_path: Path) -> None:
    report = convert_model(request(tiny_folder, tmp_path / "out", "hf", NoiseOptions(), target="nf4"))
    assert report.kinds == ("nf4",)
    assert any("fixed-grid" in warning for warning in report.warnings)


def test_tied_and_transposed_models(tmp_path: Path) -> None:
    """GPT-2: Conv1D stores its weights input-first, and its output head is tied."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=96, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    load(tmp_path / "gpt2", quantization_config=settings).save_pretrained(tmp_path / "theirs")
    convert_model(request(tmp_path / "gpt2", tmp_path / "ours", "nf4", NoneOptions()))
    assert_same_tensors(tmp_path)
    report = convert_model(request(tmp_path / "gpt2", tmp_path / "hard", "nf4"))
    assert len(report.roundings) == 8
    assert logits(load(tmp_path / "hard")).isfinite().all()


def test_skipped_modules_stay_as_they_are(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = convert_model(request(tiny_folder, out, "int8", skip=("down_proj", "model.layers.0.self_attn")))
    assert len(report.roundings) == 8
    model, warned = load_and_listen(out)
    assert warned == []
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["lm_head"] == kinds["model.layers.1.mlp.down_proj"] == kinds["model.layers.0.self_attn.q_proj"] == "Linear"
    assert kinds["model.layers.1.self_attn.q_proj"] == "Linear8bitLt"
    original = load_file(tiny_folder / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, original)


def test_an_interrupted_conversion_leaves_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        assert not list(tmp_path.glob("*/config.json"))
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_output, "write_card", stop)
    with pytest.raises(KeyboardInterrupt):
        convert_model(request(tiny_folder, tmp_path / "out", "nf4"))
    assert list(tmp_path.iterdir()) == []


def test_refusals(tiny_folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_model(request(tiny_folder, out, "nf4"))
    with pytest.raises(OutputError, match="out exists; pass --overwrite"):
        opened(request(tiny_folder, out, "nf4"))
    convert_model(request(tiny_folder, out, "nf4", overwrite=True))
    with pytest.raises(UnsupportedError, match="already quantized"):
        opened(request(out, tmp_path / "twice", "nf4"))
    with pytest.raises(OutputError, match="lie in one another"):
        opened(request(tiny_folder, tiny_folder / "out", "nf4"))
    with pytest.raises(UnsupportedError, match="needs one as input"):
        opened(request(tiny_base, tmp_path / "x", "nf4"))
    with pytest.raises(HfLoadError, match="--bnb-skip 'nothing' matches no linear module"):
        opened(request(tiny_folder, tmp_path / "x", "nf4", skip=("nothing",)))
    with pytest.raises(UnsupportedError, match="--bnb-double-quant"):
        opened(request(tiny_folder, tmp_path / "x", "int8", double_quant=True))
    with pytest.raises(UnsupportedError, match="--target goes with --to hf"):
        opened(request(tiny_folder, tmp_path / "x", "nf4", target="all"))
    learned = replace(request(tiny_folder, tmp_path / "x", "hf"), defense=QuantGuardOptions())
    with pytest.raises(UnsupportedError, match="quantguard fits the codes of one format"):
        opened(learned)
    with pytest.raises(UnsupportedError, match="choose one of nf4, fp4, int8, all"):
        opened(request(tiny_folder, tmp_path / "x", "hf", target="q4_0"))


def test_weights_that_are_not_numbers_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(tiny_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        convert_model(request(folder, tmp_path / "out", "nf4"))
    assert not (tmp_path / "out").exists()


def test_dry_run_writes_nothing_and_knows_the_size(tiny_folder: Path, tmp_path: Path) -> None:
    plan = dry_run(request(tiny_folder, tmp_path / "out", "nf4"))
    assert list(tmp_path.iterdir()) == []
    rounded = [tensor for tensor in plan.tensors if tensor.protection == "scalar"]
    assert len(rounded) == 14
    assert {tensor.target_type for tensor in rounded} == {"NF4"}
    report = convert_model(request(tiny_folder, tmp_path / "out", "nf4"))
    # Code books and descriptions come on top: 64 bytes and about 90 per matrix.
    assert 0 <= report.out_bytes - plan.out_bytes <= 14 * 200
    assert report.base_bytes == plan.base_bytes


def test_command_line(tiny_folder: Path, tmp_path: Path, cli: CommandLine) -> None:
    done = cli("convert", tiny_folder, "--to", "NF4", "--json", "--seed", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["outfile"], document["file_type"], document["seed"]) == ("tiny-NF4", "NF4", 5)
    assert len(document["tensors"]) == 14
    assert str(tmp_path) not in done.stdout
    assert done.stderr == ""
    quiet = cli("convert", tiny_folder, "--to", "int8", "-q", cwd=tmp_path)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    again = cli("convert", tiny_folder, "--to", "nf4", cwd=tmp_path)
    assert again.returncode == 2
    assert "tiny-NF4 exists; pass --overwrite" in again.stderr
    moved = ("convert", tiny_folder, "--to", "hf", "--target", "all", "-o", "moved")
    refused = cli(*moved, cwd=tmp_path)  # the default fits codes to text, and here several formats share the weights
    assert refused.returncode == 2
    assert "--defense ortho" in refused.stderr
    shown = cli(*moved, "--defense", "ortho", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    for words in ("NF4", "FP4", "INT8", "bitsandbytes agrees", "given up", "transformers loads it", "wrote moved"):
        assert words in shown.stdout
    for wrong, said in (
        (("--to", "nf4", "--pure"), "--pure does not go with --to nf4"),
        (("--to", "q4_k", "--target", "all"), "--target does not go with --to q4_k"),
    ):
        refused = cli("convert", tiny_folder, *wrong, cwd=tmp_path)
        assert refused.returncode == 2
        assert said in refused.stderr
