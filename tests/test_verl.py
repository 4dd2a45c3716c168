"""verl: chunks through its columns, its registered loss, and its workers with a teacher of another family under Ray.

The second half needs verl (`make test-verl` sets up an environment) and runs as verl's own `*_on_cpu` tests do: its
manager, workers, load balancer and configuration are real, the servers behind them are models of this process's size.
"""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import real_tokenizers as real  # noqa: E402
import tiny  # noqa: E402
from xtokmap import XTokMapError  # noqa: E402
from xtokmap.integrations.verl.columns import COLUMNS, lay, read  # noqa: E402
from xtokmap.losses.credit import CREDITS, chunk_credit  # noqa: E402
from xtokmap.torch import Pair  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:fastokens gives other ids"),
    # What verl and Ray warn of is theirs.
    *([pytest.mark.filterwarnings("ignore")] if importlib.util.find_spec("verl") else []),
]
WITHOUT_COVER = [credit for credit in CREDITS if credit != "cover"]
TEXTS = ["the quick brown fox", "naïve café, 你好 世界", "x", "1234567890 + 42 = ?\n"]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair(tiny.student_tokenizer(), tiny.teacher_tokenizer(), loss="prior")


def responses() -> list[list[int]]:
    """As sampled: ends of turns, tokens that no tokenizer would have made so, a character that is cut, nothing."""
    tokenizer = tiny.student_tokenizer()
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    letters = [i for letter in "the dog" for i in tokenizer.encode(letter, add_special_tokens=False)]
    cut = tokenizer.encode("ab 你", add_special_tokens=False)[:-1]
    return [[*rows[0], tokenizer.eos_token_id], rows[1], rows[2], [*letters, tokenizer.eos_token_id], cut, [], rows[3]]


# ---- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("credit", WITHOUT_COVER)
def test_a_credit_is_the_same_behind_the_columns(pair: Pair, credit: Any) -> None:
    """Laid row by row, padded with anything, read as a batch: as if both sides' tokens were there."""
    rows = responses()
    prompts = [[5] * (b + 1) for b in range(len(rows))]
    batch = pair.prepare((prompts, prompts), rows)
    torch.manual_seed(0)
    student = -3 * torch.rand(batch.index.student_chunk.shape)
    teacher = -3 * torch.rand(batch.index.teacher_chunk.shape)
    teacher[1, 2] = float("nan")
    width = student.shape[1] + 2
    ids = torch.randint(0, 1000, (len(rows), width, COLUMNS), dtype=torch.int32)
    logprobs = torch.randn(ids.shape)
    mask = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    for b, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        one = pair.prepare(([prompt], [prompt]), [row])
        laid = lay(one.index, teacher[b, : one.index.teacher_chunk.shape[1]], len(prompt), len(row))
        assert all(x.shape == (len(prompt) + len(row), COLUMNS) for x in laid)
        assert laid[0][: len(prompt) - 1, 0].eq(-1).all()
        ids[b, : len(row)], logprobs[b, : len(row)] = (x[len(prompt) - 1 : -1] for x in laid)
    sums, index = read(ids, logprobs, mask)
    padded = torch.nn.functional.pad(student, (0, 2), value=7.0)
    found = chunk_credit(padded, sums, index, credit, clamp=2.0)
    expected = chunk_credit(student, teacher, batch.index, credit, clamp=2.0)
    for name, value in expected._asdict().items():
        got = getattr(found, name)
        torch.testing.assert_close(got[:, :-2], value, msg=f"{name} of {credit}")
        assert not got[:, -2:].any()
    assert expected.scored.sum() > 10
    assert expected.nonfinite.any() == (credit != "strict")  # the chunk of the NaN has several tokens


def test_columns_of_something_else_are_named() -> None:
    with pytest.raises(XTokMapError, match=r"not 4 columns: the losses xtokmap_\* need the worker of xtokmap\.integr"):
        read(torch.zeros(2, 3, 1), torch.zeros(2, 3, 1), torch.ones(2, 3, dtype=torch.bool))


# ---- in verl ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verl() -> Any:
    return pytest.importorskip("verl", reason="verl is not installed here: make test-verl has an environment")


def test_verl_finds_the_losses_by_itself(verl: Any) -> None:
    """In a process that imports verl and nothing else: the entry point is what it finds."""
    code = (
        "import sys, verl, verl.trainer.distillation.losses as d\n"
        "print(*sorted(name for name in d.DISTILLATION_LOSS_REGISTRY if name.startswith('xtokmap_')))\n"
        "assert 'xtokmap.integrations.verl.agent_loop' not in sys.modules\n"
        "settings = d.get_distillation_loss_settings('xtokmap_prior')\n"
        "assert settings.use_estimator and not settings.use_topk\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == sorted(f"xtokmap_{credit}" for credit in WITHOUT_COVER)


class StudentServer:
    """Answers a prompt with a response of the tests' own, by the prompt."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    async def generate(self, request_id: str, prompt_ids: list[int], sampling_params: Any, **kwargs: Any) -> Any:
        from verl.workers.rollout.replica import TokenOutput

        return TokenOutput(token_ids=self.rows[sum(prompt_ids) % len(self.rows)])


class TeacherServer:
    """A model that answers as verl's vLLM server does: row i scores token i + 1, the last one nothing."""

    def __init__(self, path: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
        self.asked: list[list[int]] = []
        self.lie = False

    async def generate(self, request_id: str, prompt_ids: list[int], sampling_params: Any, **kwargs: Any) -> Any:
        from verl.workers.rollout.replica import TokenOutput

        assert sampling_params["prompt_logprobs"] == 0
        assert sampling_params["max_tokens"] == 1
        self.asked.append(prompt_ids)
        scores = logprobs_of(self.model, prompt_ids)
        ids = [*prompt_ids[1:], 0]
        if self.lie:
            ids[0] += 1
        extra = {"prompt_ids": [[i] for i in ids], "prompt_logprobs": [[x] for x in [*scores.tolist(), 0.0]]}
        return TokenOutput(token_ids=[0], extra_fields=extra)

    async def requests(self) -> list[list[int]]:
        return self.asked

    async def be_wrong(self, lie: bool) -> None:
        self.lie = lie


@torch.no_grad()
def logprobs_of(model: Any, ids: list[int]) -> Any:
    """[len(ids) - 1]; entry i scores ids[i + 1]."""
    logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def tiny_sides() -> tuple[Any, Any, Any, Any]:
    return tiny.student_model(), tiny.student_tokenizer(), tiny.teacher_model(), tiny.teacher_tokenizer()


def real_sides() -> tuple[Any, Any, Any, Any]:
    """DeepSeek's tokenizer and Anthropic's, with models of their vocabularies."""
    from tokenizers import Tokenizer
    from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sides: list[Any] = []
    kinds = (
        ("deepseek", "<｜end▁of▁sentence｜>", LlamaForCausalLM, LlamaConfig, {}),
        ("anthropic", "<EOT>", Gemma2ForCausalLM, Gemma2Config, {"head_dim": 8, "attn_implementation": "eager"}),
    )
    for name, eos, kind, config, more in kinds:
        made = Tokenizer.from_file(str(real.path(name)))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, pad_token=eos)
        tokenizer.chat_template = (
            "{% for m in messages %}" + name + " {{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}" + name + " answers: {% endif %}"
        )
        torch.manual_seed(len(sides))
        sides += [kind(config(vocab_size=made.get_vocab_size(), **tiny.SIZE, **more)), tokenizer]
    return tuple(sides)  # type: ignore[return-value]


@pytest.fixture(scope="module", params=["tiny", "real"])
def engine(verl: Any, request: Any, tmp_path_factory: Any) -> Any:
    """verl's configuration, load balancers and clients, in front of two servers."""
    import ray
    from omegaconf import OmegaConf
    from verl.workers.rollout.llm_server import LLMServerClient
    from verl.workers.rollout.router import GlobalRequestLoadBalancer

    student, tokenizer, teacher, teacher_tokenizer = {"tiny": tiny_sides, "real": real_sides}[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    for name, model, side in (("student", student, tokenizer), ("teacher", teacher, teacher_tokenizer)):
        model.save_pretrained(folder / name)
        side.save_pretrained(folder / name)
    config = OmegaConf.load(Path(verl.__file__).parent / "trainer" / "config" / "_generated_ppo_trainer.yaml")
    OmegaConf.update(config, "actor_rollout_ref.model.path", str(folder / "student"))
    OmegaConf.update(config, "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu", 1)
    rollout = {"name": "vllm", "prompt_length": 64, "response_length": 48, "agent.num_workers": 2}
    for key, value in rollout.items():
        OmegaConf.update(config, f"actor_rollout_ref.rollout.{key}", value)
    distillation = {
        "enabled": True,
        "n_gpus_per_node": 1,
        "nnodes": 1,
        "teacher_models.teacher_model.model_path": str(folder / "teacher"),
        "teacher_models.teacher_model.inference.tensor_model_parallel_size": 1,
        "distillation_loss.loss_mode": "xtokmap_prior",
        "distillation_loss.use_policy_gradient": True,
        "distillation_loss.use_task_rewards": False,
        "distillation_loss.loss_max_clamp": 2.0,
    }
    for key, value in distillation.items():
        OmegaConf.update(config, f"distillation.{key}", value)
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        num_cpus=8,  # of the bookkeeping's; actors wait for each other
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": here}},
        _system_config={"memory_monitor_refresh_ms": 0},  # it ends actors where other programs fill the memory
    )
    rows = responses() if request.param == "tiny" else _real_responses(tokenizer)
    rows = [row or rows[0] for row in rows]  # verl's own prompt builder wants an answer
    servers = {"student": ray.remote(StudentServer).remote(rows)}
    servers["teacher"] = ray.remote(TeacherServer).remote(str(folder / "teacher"))
    balancer = ray.remote(GlobalRequestLoadBalancer)
    clients = {name: LLMServerClient(config, balancer.remote({name: server})) for name, server in servers.items()}
    yield SimpleNamespace(
        config=config,
        clients=clients,
        servers=servers,
        models=(student.eval(), teacher.eval()),
        pair=Pair(tokenizer, teacher_tokenizer, loss="prior"),
        ray=ray,
    )
    ray.shutdown()


def _real_responses(tokenizer: Any) -> list[list[int]]:
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in [*TEXTS, "def f(x):\n    return x  # 🙂 \t"]]
    return [[*row, tokenizer.eos_token_id] if k % 2 else row for k, row in enumerate(rows)]


QUESTIONS = ["what is the sky?", "the dog", "1 + 2", "naïve", "a fox?", "and the grass?", "你好"]


def rollout(engine: Any, *, validate: bool = False) -> Any:
    """What verl's trainer gets of its manager, for a batch of questions."""
    from verl import DataProto
    from verl.utils.import_utils import load_class_from_fqn

    name = "xtokmap.integrations.verl.agent_loop.CrossFamilyManager"
    manager = load_class_from_fqn(name, "AgentLoopManager").create(
        config=engine.config,
        llm_client=engine.clients["student"],
        teacher_client={"default": engine.clients["teacher"]},
        reward_loop_worker_handles=None,
    )
    raw = np.empty(2 * len(QUESTIONS), dtype=object)
    raw[:] = [[{"role": "user", "content": f"{question} {k}"}] for question in QUESTIONS for k in range(2)]
    extra = {"raw_prompt": raw, "data_source": np.array(["default"] * len(raw), dtype=object)}
    prompts = DataProto.from_dict(tensors={"k": torch.arange(len(raw))}, non_tensors=extra)
    prompts.meta_info["validate"] = validate
    try:
        return manager.generate_sequences(prompts)
    finally:
        for worker in manager.agent_loop_workers:
            engine.ray.kill(worker)


@pytest.fixture(scope="module")
def rolled(engine: Any) -> Any:
    return rollout(engine)


def rows_of(rolled: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses without padding."""
    width = rolled.batch["prompts"].shape[1]
    masks = rolled.batch["attention_mask"].bool()
    sides = ((rolled.batch["prompts"], masks[:, :width]), (rolled.batch["responses"], masks[:, width:]))
    prompts, answers = ([row[m].tolist() for row, m in zip(ids, mask, strict=True)] for ids, mask in sides)
    return prompts, answers


def expected(engine: Any, rolled: Any) -> tuple[Any, Any, Any]:
    """The batch, the student's and the teacher's logprobs, all by a `Pair` and the models themselves."""
    prompts, answers = rows_of(rolled)
    conversations = [list(messages) for messages in rolled.non_tensor_batch["raw_prompt"]]
    rendered = engine.pair.prepare(conversations, answers)
    assert rendered.student_prompt_ids == prompts  # verl's own renderer and this one
    sides = (
        (engine.models[0], rendered.student_prompt_ids, rendered.student_ids, rendered.index.student_chunk.shape[1]),
        (engine.models[1], rendered.teacher_prompt_ids, rendered.teacher_ids, rendered.index.teacher_chunk.shape[1]),
    )
    found = []
    for model, before, after, width in sides:
        scores = torch.zeros(len(after), width)
        for b, (prompt, ids) in enumerate(zip(before, after, strict=True)):
            scores[b, : len(ids)] = logprobs_of(model, prompt + ids)[len(prompt) - 1 :]
        found.append(scores)
    return rendered, *found


def test_the_teacher_is_asked_in_its_own_words(engine: Any, rolled: Any) -> None:
    asked = engine.ray.get(engine.servers["teacher"].requests.remote())
    batch, _, _ = expected(engine, rolled)
    want = [[*prompt, *ids] for prompt, ids in zip(batch.teacher_prompt_ids, batch.teacher_ids, strict=True)]
    assert sorted(asked) == sorted(want)
    assert len(asked) == 2 * len(QUESTIONS)
    _, answers = rows_of(rolled)
    assert len({tuple(row) for row in answers}) >= 4
    assert any(row[-1] == engine.pair.tokenizers[0].eos_token_id for row in answers)


def test_the_rows_of_every_token_hold_its_chunk(engine: Any, rolled: Any) -> None:
    """Row i scores token i + 1, behind verl's own padding."""
    batch, _, teacher = expected(engine, rolled)
    width = rolled.batch["prompts"].shape[1]
    ids, sums = rolled.batch["teacher_ids"], rolled.batch["teacher_logprobs"]
    assert ids.shape == sums.shape == (*rolled.batch["input_ids"].shape, COLUMNS)
    by_chunk = batch.index.to_student(batch.index.sum_teacher(teacher))
    kinds = batch.index.to_student(batch.index.kind)
    for b, row in enumerate(batch.student_ids):
        found = slice(width - 1, width - 1 + len(row))
        torch.testing.assert_close(sums[b, found, 0], by_chunk[b, : len(row)], atol=1e-4, rtol=1e-4)
        assert ids[b, found, 1].tolist() == kinds[b, : len(row)].tolist()
        assert ids[b, found, 3].tolist() == batch.index.student_len[b, : len(row)].tolist()


@pytest.mark.parametrize("credit", WITHOUT_COVER)
def test_the_loss_is_that_of_the_credit(engine: Any, rolled: Any, credit: str) -> None:
    """verl's whole loss of a batch, from its own layout without padding, and the gradient that it gives."""
    from verl.trainer.distillation.losses import distillation_ppo_loss
    from verl.utils import tensordict_utils as tu
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.padding import left_right_2_no_padding

    batch, student, teacher = expected(engine, rolled)
    config = omega_conf_to_dataclass(engine.config.actor_rollout_ref.actor)
    settings = engine.config.distillation.copy()
    settings.distillation_loss.loss_mode = f"xtokmap_{credit}"
    distillation = omega_conf_to_dataclass(settings)
    data = left_right_2_no_padding(rolled.batch.clone())
    mask = data["response_mask"].bool()
    old = torch.zeros(mask.shape)
    old[:, : student.shape[1]] = student
    data["old_log_probs"], data["advantages"] = old, torch.zeros_like(old)
    counted = {"dp_size": 1, "batch_num_tokens": int(mask.sum()), "global_batch_size": len(mask)}
    for key, value in counted.items():
        tu.assign_non_tensor_data(data, key, value)
    # The student's logprobs as its engine gives them: row i scores token i + 1, rows end to end.
    flat = torch.zeros(data["input_ids"].values().shape[0])
    for b, end in enumerate(data["input_ids"].offsets()[1:].tolist()):
        m = len(batch.student_ids[b])
        flat[end - m - 1 : end - 1] = student[b, :m]
    flat.requires_grad_()
    logprobs = torch.nested.nested_tensor_from_jagged(flat, offsets=data["input_ids"].offsets())
    loss, metrics = distillation_ppo_loss(config, distillation, {"log_probs": logprobs}, data)
    given = chunk_credit(student, teacher, batch.index, credit, clamp=2.0)  # type: ignore[arg-type]
    assert given.advantages.abs().sum() > 1
    want = -given.advantages.sum() / mask.sum()
    torch.testing.assert_close(loss.detach(), want, atol=1e-4, rtol=1e-4)
    loss.backward()
    assert flat.grad is not None
    for b, end in enumerate(data["input_ids"].offsets()[1:].tolist()):
        m = len(batch.student_ids[b])
        gradient = -given.advantages[b, :m] / mask.sum()
        torch.testing.assert_close(flat.grad[end - m - 1 : end - 1], gradient, atol=1e-5, rtol=1e-3)
    assert metrics["distillation/scored"].aggregate() == pytest.approx(given.scored.sum().item() / mask.sum().item())
    assert metrics["distillation/kl_per_byte"].aggregate() > 0


def test_the_transfer_queue_gets_the_same(engine: Any, rolled: Any) -> None:
    """verl's newer trainer: workers put every sample into a queue, from which its engines take what they need."""
    tq = pytest.importorskip("transfer_queue")
    from omegaconf import OmegaConf
    from verl.utils import tensordict_utils as tu

    from xtokmap.integrations.verl.transfer_queue import CrossFamilyManagerTQ

    settings = OmegaConf.create(engine.config.transfer_queue)
    OmegaConf.update(settings, "backend.SimpleStorage.num_data_storage_units", 1)
    tq.init(settings)
    try:
        manager = CrossFamilyManagerTQ.create(
            config=engine.config,
            llm_client=engine.clients["student"],
            teacher_client={"default": engine.clients["teacher"]},
            reward_loop_worker_handles=None,
        )
        raw = rolled.non_tensor_batch["raw_prompt"]
        uids = np.array([f"sample-{b}" for b in range(len(raw))], dtype=object)
        source = np.array(["default"] * len(raw), dtype=object)
        prompts = {"index": torch.arange(len(raw)), "raw_prompt": raw, "uid": uids, "data_source": source}
        batch = tu.get_tensordict(prompts, non_tensor_dict={"global_steps": 1})
        tq.kv_batch_put(keys=list(uids), partition_id="train", tags=[{"status": "pending"}] * len(uids))
        manager.generate_sequences(batch)
        waited = time.monotonic() + 200
        while not all(tq.kv_list("train")["train"][uid]["status"] == "finished" for uid in uids):
            assert time.monotonic() < waited, tq.kv_list("train")
            time.sleep(0.5)
        keys = [f"{uid}_0_0" for uid in uids]
        fields = ["input_ids", "responses", "teacher_ids", "teacher_logprobs"]
        found = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=fields)
        for worker in manager.agent_loop_workers:
            engine.ray.kill(worker)
    finally:
        tq.close()
    mask = rolled.batch["attention_mask"].bool()
    for name in ("input_ids", "teacher_ids", "teacher_logprobs"):
        for b, row in enumerate(found[name].unbind()):
            torch.testing.assert_close(row, rolled.batch[name][b][mask[b]].to(row.dtype), msg=f"{name} of row {b}")


def test_nothing_is_asked_of_the_teacher_for_a_validation(engine: Any, rolled: Any) -> None:
    before = len(engine.ray.get(engine.servers["teacher"].requests.remote()))
    out = rollout(engine, validate=True)
    assert "teacher_ids" not in out.batch
    assert len(engine.ray.get(engine.servers["teacher"].requests.remote())) == before


def test_a_server_that_answers_for_other_ids_is_found_out(engine: Any, rolled: Any) -> None:
    engine.ray.get(engine.servers["teacher"].be_wrong.remote(True))
    try:
        with pytest.raises(Exception, match="the teacher's server answered for other ids than it was asked for"):
            rollout(engine)
    finally:
        engine.ray.get(engine.servers["teacher"].be_wrong.remote(False))


# ---- what is refused -------------------------------------------------------------------------------------------------


def worker(pair: Pair, **more: Any) -> Any:
    """A worker without verl's start: no server answers, since it must not come to that."""
    from omegaconf import OmegaConf

    from xtokmap.integrations.verl.agent_loop import CrossFamilyWorker

    made = object.__new__(CrossFamilyWorker)
    manager = SimpleNamespace(_resolve_teacher_key=lambda key: "default")
    fields = {"distillation_enabled": True, "teacher_key": "data_source", "teacher_server_manager": manager}
    fields |= {"_pairs": {"default": pair}, "config": OmegaConf.create({"data": {}}), **more}
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def ask(made: Any, source: Any = "default", **changed: Any) -> dict[str, Any]:
    output = SimpleNamespace(response_mask=[1, 1], multi_modal_data={}, extra_fields={})
    for name, value in changed.items():
        setattr(output, name, value)
    sample = {"raw_prompt": [{"role": "user", "content": "a"}], "data_source": source}
    asyncio.run(made._compute_teacher_logprobs(output, [5, 6], [7, 8], validate=False, sample_kwargs=sample))
    return output.extra_fields


def test_each_sample_goes_to_its_own_teacher(verl: Any, pair: Pair) -> None:
    """By verl's routing key, as numpy holds it, with the variables of the chat template that verl is told."""
    from omegaconf import OmegaConf

    asked: list[Any] = []

    async def compute(sequence_ids: list[int], routing_key: str) -> tuple[Any, Any]:
        asked.append((routing_key, sequence_ids))
        return torch.tensor([*sequence_ids[1:], 0])[:, None], torch.full((len(sequence_ids), 1), -1.0)

    other = copy.deepcopy(tiny.student_tokenizer())
    other.chat_template = "{% for m in messages %}{{ greeting }} {{ m.content }}{% endfor %}"
    made = worker(
        pair,
        _pairs={"math": pair, "prose": Pair(tiny.student_tokenizer(), other, loss="prior")},
        teacher_server_manager=SimpleNamespace(
            _resolve_teacher_key=lambda key: key, compute_teacher_logprobs_single=compute
        ),
        config=OmegaConf.create({"data": {"apply_chat_template_kwargs": {"greeting": "hello"}}}),
    )
    found = ask(made, np.array("prose", dtype=object))
    assert asked == [("prose", [*other.encode("hello a", add_special_tokens=False), 7, 8])]
    assert found["teacher_logprobs"].tolist() == [[0, 0, 0, 0], [-1, 0, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 0]]
    assert found["teacher_ids"][:, 0].tolist() == [-1, 0, 1, -1]
    ask(made, np.array("math", dtype=object))
    key, sequence = asked.pop()
    teacher_ids = pair.aligner.teacher_ids([[7, 8]])[0].tolist()
    assert (key, sequence[-len(teacher_ids) :]) == ("math", teacher_ids)


def test_samples_that_cannot_be_put_to_the_teacher_are_refused(verl: Any, pair: Pair) -> None:
    with pytest.raises(XTokMapError, match="a response with turns that the student did not write"):
        ask(worker(pair), response_mask=[1, 0])
    with pytest.raises(XTokMapError, match="images, video or audio cannot be put to a teacher"):
        ask(worker(pair), multi_modal_data={"images": [object()]})


def test_a_loss_of_one_vocabulary_is_refused_at_the_start(verl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.experimental.agent_loop.agent_loop import AgentLoopWorker

    from xtokmap.integrations.verl.agent_loop import CrossFamilyWorker

    def started(self: Any, mode: str, tools: list[Any]) -> None:
        config = SimpleNamespace(loss_mode=mode)
        self.distillation_enabled, self.tools = True, tools
        self.model_config = SimpleNamespace(trust_remote_code=False)
        self.teacher_server_manager = SimpleNamespace(distillation_loss_config=config, teacher_model_configs={})

    monkeypatch.setattr(AgentLoopWorker, "__init__", started)
    with pytest.raises(XTokMapError, match="loss_mode=k1 compares tokens of one vocabulary; use one of xtokmap_"):
        CrossFamilyWorker("k1", [])
    with pytest.raises(XTokMapError, match="tools: a response with a tool's turns is not rendered"):
        CrossFamilyWorker("xtokmap_prior", [object()])
    assert CrossFamilyWorker("xtokmap_prior", [])._pairs == {}


def test_a_credit_without_a_policy_gradient_is_refused(verl: Any) -> None:
    from xtokmap.integrations.verl.plugin import credit_loss

    settings = SimpleNamespace(loss_mode="xtokmap_prior", use_policy_gradient=False)
    with pytest.raises(XTokMapError, match="credits are advantages, which nothing flows back through; set dist"):
        credit_loss(None, SimpleNamespace(distillation_loss=settings), {}, {})


def test_the_manager_of_the_transfer_queue_has_these_workers(verl: Any) -> None:
    pytest.importorskip("transfer_queue")
    from omegaconf import OmegaConf
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ

    from xtokmap.integrations.verl.transfer_queue import CrossFamilyManagerTQ, CrossFamilyWorkerTQ

    made = CrossFamilyManagerTQ(OmegaConf.create({"actor_rollout_ref": {"rollout": {}, "model": {}}}), None)
    assert isinstance(made, AgentLoopManagerTQ)
    assert issubclass(made.agent_loop_workers_class.__ray_metadata__.modified_class, CrossFamilyWorkerTQ)
    # By name: Ray wraps the methods of an actor's class.
    methods = [CrossFamilyWorkerTQ._compute_teacher_logprobs, CrossFamilyWorkerTQ._agent_loop_postprocess]
    names = ["CrossFamily._compute_teacher_logprobs", "AgentLoopWorkerTQ._agent_loop_postprocess"]
    assert [method.__qualname__ for method in methods] == names


def test_the_example_says_whether_a_run_can_start(verl: Any, tmp_path: Path) -> None:
    pytest.importorskip("transfer_queue")
    import hydra
    from verl.utils.config import omega_conf_to_dataclass
    from verl.utils.import_utils import load_class_from_fqn

    for name, tokenizer in (("student", tiny.student_tokenizer()), ("teacher", tiny.teacher_tokenizer())):
        tokenizer.save_pretrained(tmp_path / name)
    example = Path(__file__).parents[1] / "examples" / "verl_check.py"
    assert len(example.read_text(encoding="utf-8").splitlines()) < 40
    command = [sys.executable, str(example), str(tmp_path / "student"), str(tmp_path / "teacher")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    *_, losses, coverage, run = done.stdout.splitlines()
    assert losses.startswith("losses: xtokmap_strict, xtokmap_prior")
    assert coverage.startswith("coverage: ")
    assert run.startswith("python -m verl.trainer.main_ppo ")
    folder = Path(verl.__file__).parent / "trainer" / "config"
    with hydra.initialize_config_dir(str(folder), version_base=None):
        config = hydra.compose("ppo_trainer", run.split()[3:])  # which refuses settings that are none of verl's
    asked = config.actor_rollout_ref.rollout.agent.agent_loop_manager_class
    assert load_class_from_fqn(asked, "AgentLoopManager").__name__ == "CrossFamilyManagerTQ"
    assert omega_conf_to_dataclass(config.actor_rollout_ref.rollout.agent).agent_loop_manager_class == asked
    assert config.distillation.distillation_loss.loss_max_clamp == 10
