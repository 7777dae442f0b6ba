"""Calibration: what it fits is what the definitions say, what it writes is served, and the model it runs is the checkpoint's own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from actors.expert_store import ExpertStore
from cluster.core.descriptors import ExpertDescriptor
from cluster.core.errors import ConfigError
from cluster.core.ladder_record import SHIPPED, WITHOUT
from cluster.core.spec import ShadowSpec
from cluster.registry.ladder_file import Ladder
from kit.models import HIDDEN, NUM_EXPERTS, NUM_LAYERS, VOCAB, save_tiny
from router_service.calibration import shadows
from router_service.calibration.fitting import Training, distilled, forward_with_gradient, fresh_start, narrow_start, ridge
from router_service.calibration.run import Options, calibrate, split_texts
from router_service.calibration.subject import Loss, Subject, wide_weights
from router_service.models import load_model

NARROW = ExpertDescriptor(hidden_size=12, intermediate_size=8, dtype="fp32")


def _with_tokenizer(folder: Path) -> Path:
    unknown = "?"
    plain = Tokenizer(WordLevel({chr(code): code for code in range(VOCAB)}, unk_token=unknown))
    plain.pre_tokenizer = Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=plain, bos_token=chr(1), unk_token=unknown).save_pretrained(folder)
    return folder


def _text(seed: int, length: int) -> str:
    return "".join(chr(code) for code in np.random.default_rng(seed).integers(33, 120, length))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _with_tokenizer(save_tiny("olmoe", tmp_path_factory.mktemp("calibration") / "model", torch.bfloat16))


def test_a_calibrated_folder_is_imported_with_its_fallbacks_and_fitted_shadows(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadows, "_NARROW_TRAINING", Training(steps=5, batch=16))
    said: list[str] = []
    options = Options(max_rows=512, scored_bytes=400, training=Training(steps=20, batch=64))
    path = calibrate(folder, [_text(0, 900), _text(1, 900)], options, said.append)
    with Ladder(folder) as ladder:
        record = ladder.record
    assert set(record.order) == {"fewer_experts", "generalist", "dense"}
    assert [record.rungs[name].damage for name in record.order] == sorted(rung.damage for rung in record.rungs.values())
    assert all(len(rung.rises_percent) == 4 for rung in record.rungs.values())
    assert len(record.damage) == NUM_LAYERS * NUM_EXPERTS
    measured = [table for table in record.damage.values() if table[WITHOUT] > 0.0]
    assert len(measured) > NUM_EXPERTS
    for table in measured:
        assert table["int8"] < table["int3"] < table[WITHOUT]
        assert table["int4"] < table["int2"]
    assert record.shadows
    assert all(record.damage[key][SHIPPED] <= record.damage[key]["int2"] * 1.2 for key in record.shadows)
    assert str(path.stat().st_size) in said[-1]
    store = ExpertStore(tmp_path / "store")
    manifest = store.import_model(folder, name="m", shadow=ShadowSpec())
    expert_bytes = manifest.model.layers[0].expert.num_bytes
    assert sum(shadow.num_bytes for shadow in manifest.shadows.values()) <= 0.15 * NUM_LAYERS * NUM_EXPERTS * expert_bytes
    fitted = {key for key, shadow in manifest.shadows.items() if key in record.shadows and shadow.codec == record.shadows[key].codec.name}
    assert fitted == set(record.shadows)
    for layer in load_model(store, manifest.digest).layers.values():
        assert layer.fallbacks is not None
        assert layer.fallbacks.can("generalist")
        assert layer.fallbacks.can("dense")


def test_the_model_under_calibration_is_transformers_own(folder: Path) -> None:
    subject = Subject(folder)
    tokens = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        assert torch.allclose(subject.model(input_ids=tokens).logits, own(input_ids=tokens).logits, atol=2e-4)


def test_an_expert_that_stands_in_for_itself_changes_nothing_and_a_lost_one_does(folder: Path) -> None:
    subject, text = Subject(folder), [_text(5, 300)]
    exact = subject.bits_per_byte(text)
    places = subject.lost_with_gpu(1, 4)
    assert places == [(layer, index) for layer in range(NUM_LAYERS) for index in (2, 3)]
    same = Loss(instead={place: wide_weights(subject, place, subject.primaries[place]) for place in places})
    assert subject.bits_per_byte(text, same) == exact
    assert subject.bits_per_byte(text, Loss(lost=places, rungs=("fewer_experts",))) != exact
    assert subject.bits_per_byte(text) == exact


def test_rows_are_bounded_and_are_those_that_the_layers_saw(folder: Path) -> None:
    rows = Subject(folder).rows([_text(6, 500), _text(7, 500)], 300, context=64)
    assert sorted(rows) == list(range(NUM_LAYERS))
    for layer in rows.values():
        assert 290 <= len(layer.x_TD) <= 300
        assert layer.x_TD.shape[1] == HIDDEN
        assert layer.ids_TK.shape == layer.weights_TK.shape
        fitted, judged = layer.split(0.25)
        assert torch.equal(torch.cat([fitted.x_TD, judged.x_TD]), layer.x_TD)


def test_ridge_solves_the_weighted_normal_equations_with_the_penalty_that_serves_held_out_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn((6, 6), generator=generator, dtype=torch.float64)
    x, w = torch.randn((400, 6), generator=generator), torch.rand(400, generator=generator)
    y = (x.double() @ truth.T).float() + 0.01 * torch.randn((400, 6), generator=generator)
    found, share = ridge(x[:300], y[:300], w[:300], (x[300:], y[300:], w[300:]))
    rows, weights = x[:300].double().numpy(), w[:300].double().numpy()
    moment = rows.T @ (weights[:, None] * rows)
    penalty = share * np.trace(moment) / 6 * np.eye(6)
    expected = np.linalg.solve(moment + penalty, rows.T @ (weights[:, None] * y[:300].double().numpy())).T
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.numpy(), truth.numpy(), atol=0.05)


def test_a_narrow_start_with_every_unit_is_the_expert_itself_and_with_fewer_keeps_those_that_matter() -> None:
    tensors = fresh_start(NARROW, seed=1)
    tensors["down"][:, 3] *= 100.0
    x = torch.randn((50, 12), generator=torch.Generator().manual_seed(2))
    whole = narrow_start(NARROW, tensors, x, 8)
    assert all(torch.equal(whole[name], tensors[name]) for name in tensors)
    one = narrow_start(NARROW, tensors, x, 1)
    assert torch.equal(one["down"][:, 0], tensors["down"][:, 3])
    assert torch.equal(one["gate_up"], tensors["gate_up"][[3, 11]])


def test_distillation_comes_closer_to_its_target_and_is_repeatable() -> None:
    x = torch.randn((200, 12), generator=torch.Generator().manual_seed(3))
    target = forward_with_gradient(NARROW, fresh_start(NARROW, seed=4), x).detach()
    start = fresh_start(NARROW, seed=5)
    runs = [distilled(NARROW, start, x, target, torch.ones(200), Training(steps=200, batch=64, rate=1e-2)) for _ in range(2)]
    before, after = (float((forward_with_gradient(NARROW, tensors, x) - target).square().sum()) for tensors in (start, runs[0]))
    assert after < 0.5 * before
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in start)


def test_text_that_is_scored_is_never_fitted_and_short_text_is_refused() -> None:
    texts = [_text(8, 1000), _text(9, 1000)]
    used, scored = split_texts(texts, 400)
    assert [one + other for one, other in zip(used, scored, strict=True)] == texts
    assert [len(part) for part in scored] == [200, 200]
    with pytest.raises(ConfigError, match="too short"):
        split_texts(["abc"], 400)


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be run on text|makes no tokens"):
        Subject(save_tiny("olmoe", tmp_path / "model", torch.bfloat16)).rows([_text(1, 100)], 50, context=32)
