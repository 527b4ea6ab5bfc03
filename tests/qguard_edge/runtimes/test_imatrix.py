"""`qguard-edge imatrix`: llama-imatrix's sums and counts, against hooks in transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from convert.gguf_file import GgufFile
from convert.imatrix_file import load_imatrix
from qguard_edge.runtimes.imatrix import make_imatrix
from tests.helpers.activation_models import make_pair
from tests.helpers.hf_models import CASES, make_model, save_model
from tests.helpers.hf_tokenizers import corpus, digits_then_bytes, save_tokenizer, train_byte_bpe

TOKENIZER = train_byte_bpe(digits_then_bytes())
TEXT = "\n".join(corpus())[:3000]


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qguard_edge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "500"})


def test_sums_and_counts_of_every_expert(tmp_path: Path) -> None:
    pair = make_pair("qwen3-moe", tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    report = make_imatrix(
        str(tmp_path / "base.gguf"), tmp_path / "text.txt", tmp_path / "im.gguf", chunk_size=64, max_chunks=3
    )
    ids = TOKENIZER.encode(TEXT, add_special_tokens=False).ids
    seen: dict[str, list[tuple[torch.Tensor, ...]]] = {"experts": [], "o_proj": []}
    layer = pair.loaded.model.model.layers[0]
    layer.mlp.experts.register_forward_pre_hook(lambda _module, given: seen["experts"].append(given))
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _module, given: seen["o_proj"].append(given))
    with torch.inference_mode():
        for start in range(0, 192, 64):
            pair.loaded.model(torch.tensor([ids[start : start + 64]]))
    assert (report.chunks, report.tokens, report.missing) == (3, 192, ())
    file = GgufFile(report.outfile)

    def array(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        info = file.tensors[name]
        return np.frombuffer(file.raw(info.offset, info.offset + info.n_bytes), np.float32).reshape(info.shape[::-1])

    inputs = torch.cat([given[0].reshape(-1, 256) for given in seen["o_proj"]])
    assert array("blk.0.attn_output.weight.counts").tolist() == [[192]]
    assert array("blk.0.attn_output.weight.in_sum2")[0] == pytest.approx(inputs.square().sum(0).numpy(), rel=0.02)
    states, routes = (torch.cat([given[i] for given in seen["experts"]]) for i in (0, 1))
    counts, sums = array("blk.0.ffn_gate_exps.weight.counts"), array("blk.0.ffn_gate_exps.weight.in_sum2")
    for expert in range(4):
        mine = states[(routes == expert).any(-1)]
        assert counts[expert, 0] == len(mine) > 0
        assert np.linalg.norm(sums[expert] - mine.square().sum(0).numpy()) < 0.02 * np.linalg.norm(sums[expert])
    assert counts.sum() == 2 * 192
    assert load_imatrix(report.outfile).for_tensor("blk.1.ffn_down_exps.weight", 256, 4) is not None


def test_a_folder_whose_model_begins_with_a_token(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "llama")
    model = make_model(case)
    save_model(case, model, tmp_path / "model")
    save_tokenizer(TOKENIZER, tmp_path / "model", add_bos=True, add_bos_token=True)
    (tmp_path / "text.txt").write_text(TEXT)
    done = cli("imatrix", tmp_path / "model", "--text", tmp_path / "text.txt", "-o", tmp_path / "im.gguf", "--chunk-size", "32",
               "--max-chunks", "2", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["entries"], told["missing"], told["tokens"], told["chunks"]) == (14, [], 64, 2)
    ids = TOKENIZER.encode(TEXT, add_special_tokens=False).ids
    seen: list[torch.Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _module, given: seen.append(given[0][0]))
    with torch.inference_mode():
        for start in (0, 31):
            model(torch.tensor([[0, *ids[start : start + 31]]]))
    entry = load_imatrix(tmp_path / "im.gguf").entries["blk.1.ffn_down.weight"]
    assert entry == pytest.approx(torch.cat(seen).square().mean(0).numpy(), rel=0.02)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["im.gguf", "model", "text.txt"]


@pytest.mark.parametrize(
    ("kind", "words"), [("garbage", "x.gguf"), ("no block", "cannot load x.gguf"), ("no text", "no text")]
)
def test_bad_input_is_one_sentence(kind: str, words: str, tmp_path: Path) -> None:
    make_pair("llama", tmp_path)
    (tmp_path / "text.txt").write_text(TEXT if kind != "no text" else "")
    data = (tmp_path / "base.gguf").read_bytes()
    broken = {"garbage": b"GGUF" + os.urandom(500), "no block": data.replace(b"ffn_norm", b"ffn_norn"), "no text": data}[
        kind
    ]
    (tmp_path / "x.gguf").write_bytes(broken)
    done = cli("imatrix", tmp_path / "x.gguf", "--text", tmp_path / "text.txt", "-o", tmp_path / "im.gguf")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert words in done.stderr
    assert not (tmp_path / "im.gguf").exists()
