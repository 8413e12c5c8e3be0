"""The chunked loss of recovery against the plain formula in float64, and the tensors it makes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny import make_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adapt_pruner.recovery.losses import Distillation, HeadInput, default_chunk_tokens, recovery_loss

BATCH, LENGTH, VOCABULARY, HIDDEN, TEACHER_HIDDEN = 3, 17, 101, 24, 40
DISTILLATION = Distillation(temperature=3.0, alpha=0.3)


def make_head(hidden_size, seed, dtype=torch.float32, bias=True, softcap=None, shape=(BATCH, LENGTH)):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, hidden_size, generator=draw)
    weight = torch.randn(VOCABULARY, hidden_size, generator=draw) * 2 / math.sqrt(hidden_size)
    offset = torch.randn(VOCABULARY, generator=draw) if bias else None
    return cast(HeadInput(hidden, weight, offset, softcap), dtype)


def make_labels(shape=(BATCH, LENGTH), seed=5):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(VOCABULARY, shape, generator=draw)
    labels[torch.rand(shape, generator=draw) < 0.3] = -100
    return labels


def cast(head, dtype):
    """The head in a dtype, its tensors as leaves with gradients."""
    tensors = (None if t is None else t.detach().to(dtype).requires_grad_() for t in head[:3])
    return HeadInput(*tensors, head.softcap)


def plain_logits(head):
    logits = F.linear(*head[:3])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def plain_loss(student, labels, teacher=None, distillation=None, num_items=None):
    """The formula, with all logits: (loss, cross-entropy, divergence)."""
    logits, targets = plain_logits(student)[:, :-1], labels[:, 1:]
    used = targets != -100
    items = used.sum() if num_items is None else num_items
    cross_entropy = F.cross_entropy(logits[used], targets[used], reduction="sum") / items
    if teacher is None:
        return cross_entropy, cross_entropy, None
    t = distillation.temperature
    p = (plain_logits(teacher).detach()[:, :-1][used] / t).log_softmax(-1)
    q = (logits[used] / t).log_softmax(-1)
    divergence = t**2 * F.kl_div(q, p, log_target=True, reduction="sum") / items
    loss = distillation.alpha * divergence + (1 - distillation.alpha) * cross_entropy
    return loss, cross_entropy, divergence


def gradients(loss, head):
    return torch.autograd.grad(loss, [t for t in head[:3] if t is not None])


def distance(a, b):
    return (a.double() - b.double()).norm().item()


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, None])
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_the_plain_formula(dtype, with_teacher, softcap, chunk_tokens):
    labels = make_labels()
    student = make_head(HIDDEN, 0, dtype, bias=softcap is None, softcap=softcap)
    teacher = make_head(TEACHER_HIDDEN, 1, dtype, softcap=softcap) if with_teacher else None
    kd = DISTILLATION if with_teacher else None
    exact_student = cast(student, torch.float64)
    exact_teacher = cast(teacher, torch.float64) if with_teacher else None
    exact = plain_loss(exact_student, labels, exact_teacher, kd)
    plain = plain_loss(student, labels, teacher, kd)
    ours = recovery_loss(student, labels, teacher=teacher, distillation=kd, chunk_tokens=chunk_tokens)

    for mine, theirs, right in zip(ours, plain, exact, strict=True):
        if right is None:
            assert mine is None
            continue
        assert mine.dtype == torch.float32
        # The plain formula may hit a scalar by chance, so a rounding or two are granted.
        assert distance(mine, right) <= 2 * distance(theirs, right) + 2 * 2**-23 * abs(right.item())
    assert not ours.cross_entropy.requires_grad
    right = gradients(exact[0], exact_student)
    for mine, theirs, true in zip(
        gradients(ours.loss, student), gradients(plain[0], student), right, strict=True
    ):
        assert mine.dtype == dtype
        assert true.norm() > 0
        assert distance(mine, true) <= 2 * distance(theirs, true)
    if with_teacher:
        assert all(t.grad is None for t in teacher[:3] if t is not None)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast_has_products_in_its_own_dtype(weight_dtype):
    labels = make_labels()
    student, teacher = make_head(HIDDEN, 0), make_head(TEACHER_HIDDEN, 1)
    student = HeadInput(student.hidden, cast(student, weight_dtype).weight, None, None)
    teacher = teacher._replace(bias=None)
    exact_student = cast(student, torch.float64)
    exact = plain_loss(exact_student, labels, cast(teacher, torch.float64), DISTILLATION)[0]
    with torch.autocast("cpu", torch.bfloat16):
        plain = plain_loss(student, labels, teacher, DISTILLATION)[0]
        ours = recovery_loss(student, labels, teacher=teacher, distillation=DISTILLATION, chunk_tokens=8).loss
        with Watch() as watch:
            recovery_loss(student, labels)
    assert watch.products == {torch.bfloat16}
    right = gradients(exact, exact_student)
    for mine, theirs, true in zip(gradients(ours, student), gradients(plain, student), right, strict=True):
        assert mine.dtype == theirs.dtype
        assert distance(mine, true) <= 2 * distance(theirs, true)
        assert distance(mine, true) > 1e-4 * true.norm()  # bf16 it was


def test_hidden_states_and_head_in_different_dtypes():
    labels, student = make_labels(), make_head(HIDDEN, 0)
    hidden = student.hidden.detach().bfloat16().requires_grad_()
    loss = recovery_loss(HeadInput(hidden, student.weight, student.bias, None), labels).loss
    narrow = cast(student, torch.bfloat16)
    expected = recovery_loss(narrow, labels).loss
    assert torch.equal(loss, expected)
    of_hidden, of_weight, _ = gradients(loss, (hidden, student.weight, student.bias))
    assert (of_hidden.dtype, of_weight.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(of_weight.bfloat16(), gradients(expected, narrow)[1])


def test_gradients_in_float64():
    labels = make_labels((2, 5))
    student = make_head(6, 0, torch.float64, softcap=4.0, shape=(2, 5))
    teacher = make_head(9, 1, torch.float64, shape=(2, 5))

    def loss(hidden, weight, bias):
        return recovery_loss(
            HeadInput(hidden, weight, bias, student.softcap),
            labels, teacher=teacher, distillation=DISTILLATION, num_items=11, chunk_tokens=3,
        ).loss  # fmt: skip

    assert loss(*student[:3]).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, student[:3])


def test_parts_of_a_batch_add_up_to_the_batch():
    labels, student, teacher = make_labels(), make_head(HIDDEN, 0), make_head(TEACHER_HIDDEN, 1)
    items = (labels[:, 1:] != -100).sum()
    whole = recovery_loss(student, labels, teacher=teacher, distillation=DISTILLATION)
    parts = [
        recovery_loss(
            student._replace(hidden=student.hidden[rows]), labels[rows], num_items=items,
            teacher=teacher._replace(hidden=teacher.hidden[rows]), distillation=DISTILLATION,
        )
        for rows in (slice(0, 1), slice(1, 3))
    ]  # fmt: skip
    for each in range(3):
        torch.testing.assert_close(sum(part[each] for part in parts), whole[each])
    expected = gradients(whole.loss, student)
    torch.testing.assert_close(gradients(sum(part.loss for part in parts), student), expected)


def test_upstream_gradient_and_a_retained_graph():
    labels, student = make_labels(), make_head(HIDDEN, 0)
    loss = recovery_loss(student, labels).loss
    once = torch.autograd.grad(loss, student[:3], retain_graph=True)
    thrice = torch.autograd.grad(loss * 3, student[:3])
    torch.testing.assert_close(thrice, tuple(3 * each for each in once))


def test_no_label_at_all():
    student, teacher = make_head(HIDDEN, 0), make_head(TEACHER_HIDDEN, 1)
    labels = torch.full((BATCH, LENGTH), -100)
    labels[:, 0] = 3  # predicted by nothing
    for num_items in (None, 40, torch.tensor(0)):
        out = recovery_loss(student, labels, num_items=num_items, teacher=teacher, distillation=DISTILLATION)
        assert [each.item() for each in out] == [0, 0, 0]
        assert all(not each.any() for each in gradients(out.loss, student))


def test_only_positions_with_a_label_matter():
    labels, student = make_labels(), make_head(HIDDEN, 0)
    unused = F.pad(labels[:, 1:], (0, 1), value=-100) == -100
    hidden = student.hidden.detach().clone()
    hidden[unused] = math.nan
    hidden.requires_grad_()
    loss = recovery_loss(student._replace(hidden=hidden), labels).loss
    assert torch.equal(loss, recovery_loss(student, labels).loss)
    of_hidden, of_weight = torch.autograd.grad(loss, (hidden, student.weight))
    assert not of_hidden[unused].any()
    assert of_hidden[~unused].any(-1).all()
    assert of_weight.isfinite().all()


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_teacher_of_equal_logits_diverges_by_nothing(softcap):
    student = make_head(HIDDEN, 0, softcap=softcap)
    kd = Distillation(temperature=2.0, alpha=1.0)
    out = recovery_loss(student, make_labels(), teacher=student, distillation=kd)
    assert out.loss.item() == out.divergence.item() == 0
    assert out.cross_entropy > 1
    assert gradients(out.loss, student)[0].abs().max() < 1e-7


def test_tokens_that_a_head_rules_out():
    """Of -inf: in both heads, or in the teacher alone, they add nothing; in the student alone, infinity."""
    student, teacher = make_head(HIDDEN, 0), make_head(TEACHER_HIDDEN, 1)
    labels = make_labels()
    labels[(labels >= 0) & (labels < 4)] = 9
    with torch.no_grad():
        student.bias[:2] = -math.inf
        teacher.bias[:4] = -math.inf
    out = recovery_loss(student, labels, teacher=teacher, distillation=DISTILLATION)
    with torch.no_grad():
        low_student, low_teacher = cast(student, torch.float64), cast(teacher, torch.float64)
        low_student.bias[:2] = low_teacher.bias[:4] = -1000
    expected = plain_loss(low_student, labels, low_teacher, DISTILLATION)
    for mine, right in zip(out, expected, strict=True):
        assert mine.item() == pytest.approx(right.item(), rel=1e-5)
    for mine, right in zip(gradients(out.loss, student), gradients(expected[0], low_student), strict=True):
        torch.testing.assert_close(mine, right.float(), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        student.bias[50] = -math.inf
    labels[labels == 50] = 9
    out = recovery_loss(student, labels, teacher=teacher, distillation=DISTILLATION)
    assert out.divergence.item() == math.inf
    assert out.cross_entropy.isfinite()


def test_large_logits_do_not_overflow():
    student = make_head(HIDDEN, 0)
    scaled = cast(student._replace(weight=student.weight * 1000), torch.float32)
    labels = make_labels()
    kd = Distillation(temperature=0.5, alpha=0.5)
    out = recovery_loss(scaled, labels, teacher=student, distillation=kd)
    right = plain_loss(cast(scaled, torch.float64), labels, cast(student, torch.float64), kd)
    assert out.loss.item() == pytest.approx(right[0].item(), rel=1e-5)
    assert all(each.isfinite().all() for each in gradients(out.loss, scaled))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_model_with_a_tied_head(family):
    """The loss and every gradient of a model, whose embedding is the head too, as transformers has them."""
    model = make_model(family)
    tokens = torch.randint(4, 260, (2, 12), generator=torch.Generator().manual_seed(3))
    expected = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    names = [name for name, _ in model.named_parameters()]
    right = torch.autograd.grad(expected, list(model.parameters()))
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    softcap = getattr(model.config, "final_logit_softcapping", None)
    assert (softcap is not None) == (family == "gemma2")
    head = HeadInput(hidden, model.lm_head.weight, None, softcap)
    loss = recovery_loss(head, tokens, chunk_tokens=5).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, mine, theirs in zip(
        names, torch.autograd.grad(loss, list(model.parameters())), right, strict=True
    ):
        assert distance(mine, theirs) <= 1e-4 * theirs.norm().item(), name


class Watch(TorchDispatchMode):
    """The tensors that operations make: the largest, the most bytes alive together, dtypes of products."""

    def __init__(self):
        super().__init__()
        self.largest = self.peak = 0
        self.products, self._alive = set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        out = func(*args, **(kwargs or {}))
        self._alive = {key: ref for key, ref in self._alive.items() if not ref[0].expired()}
        for tensor in (t for t in tree_leaves(out) if torch.is_tensor(t)):
            storage = tensor.untyped_storage()
            if storage._cdata not in inputs:  # neither a view nor in place
                self.largest = max(self.largest, tensor.numel())
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
                self.products.add(tensor.dtype)
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def wide_heads(requires_grad=True):
    """Logits of 512 tokens by 32,768: 64 MiB, far more than the heads and hidden states."""
    draw = torch.Generator().manual_seed(0)
    heads = (
        HeadInput(torch.randn(1, 512, size, generator=draw), torch.randn(32768, size, generator=draw) / 4)
        for size in (8, 12)
    )
    student, teacher = heads
    student.hidden.requires_grad_()
    student.weight.requires_grad_(requires_grad)
    return student, teacher, torch.randint(32768, (1, 512), generator=draw)


def test_no_tensor_holds_the_logits_of_all_tokens():
    student, teacher, labels = wide_heads()
    with Watch() as plain:
        plain_loss(student, labels, teacher, DISTILLATION)[0].backward()
    expected = student.weight.grad
    student.weight.grad = None
    with Watch() as ours:
        recovery_loss(
            student, labels, teacher=teacher, distillation=DISTILLATION, chunk_tokens=16
        ).loss.backward()
    assert plain.largest == 512 * 32768  # so the watch would see one
    assert ours.largest == 16 * 32768
    # Three tensors of a chunk and a mask, besides the weight's gradient.
    assert ours.peak <= 3.5 * 4 * 16 * 32768 + 4 * student.weight.numel() + 2**20
    assert ours.peak < 0.05 * plain.peak
    assert distance(student.weight.grad, expected) < 1e-5 * expected.norm()


def test_without_gradients_their_work_is_left_out():
    student, teacher, labels = wide_heads(requires_grad=False)
    kd = {"teacher": teacher, "distillation": DISTILLATION, "chunk_tokens": 4}
    labels[:, 40:] = -100
    with Watch() as frozen:
        recovery_loss(student, labels, **kd).loss.backward()
    assert student.weight.grad is None
    assert student.hidden.grad.any()
    assert frozen.largest == 4 * 32768 < student.weight.numel()
    student.weight.requires_grad_()
    with torch.no_grad(), Watch() as measured:
        out = recovery_loss(student, labels, **kd)
    assert not out.loss.requires_grad
    assert measured.largest == 4 * 32768


def test_default_chunk_is_64_mib_of_logits_or_an_eighth_of_the_weight():
    for vocabulary, hidden_size, expected in ((2**18, 8, 64), (2**18, 1024, 128), (2**25, 1, 1)):
        weight = torch.zeros(vocabulary, hidden_size, device="meta")
        assert default_chunk_tokens(weight) == expected


def test_bad_input():
    student, teacher, labels = make_head(HIDDEN, 0), make_head(TEACHER_HIDDEN, 1), make_labels()
    kd = {"teacher": teacher, "distillation": DISTILLATION}
    for message, arguments in (
        (r"teacher is None", {"distillation": DISTILLATION}),
        (r"distillation is None", {"teacher": teacher}),
        (r"chunk_tokens is 0", {"chunk_tokens": 0}),
        (r"num_items is 0, with \d+ labels", {"num_items": 0}),
        (
            r"teacher's vocabulary is 99, the student's 101",
            kd | {"teacher": teacher._replace(weight=teacher.weight[:99], bias=None)},
        ),
        (
            r"teacher's hidden states are \(2, 17, 40\)",
            kd | {"teacher": teacher._replace(hidden=teacher.hidden[:2])},
        ),
        (r"teacher's head is \(101, 24\)", kd | {"teacher": teacher._replace(weight=student.weight)}),
        (r"teacher's bias is \(7,\)", kd | {"teacher": teacher._replace(bias=teacher.bias[:7])}),
        (r"teacher's softcap is 0", kd | {"teacher": teacher._replace(softcap=0.0)}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            recovery_loss(student, labels, **arguments)
    for wrong in (-1, VOCABULARY):
        labels[1, 3] = wrong
        with pytest.raises(ValueError, match=f"label {wrong}; expected 0 to 100"):
            recovery_loss(student, labels)
    with pytest.raises(ValueError, match=r"int32; expected torch\.int64"):
        recovery_loss(student, labels.int())
    for field, value in (
        ("temperature", 0.0),
        ("temperature", math.inf),
        ("alpha", 1.5),
        ("alpha", math.nan),
    ):
        with pytest.raises(ValueError, match=f"{field} is {value}"):
            replace(DISTILLATION, **{field: value})
