"""Attention however it is written, and what is like it but no attention."""

import copy

import engine_cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ncsn_fast.engines.cpu.plan import CpuPlan
from ncsn_fast.engines.lowering.lower import lower
from ncsn_fast.engines.precision import BOUNDS

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
C, HEADS = 16, 2


def score_sde(q, k, v):
    n, c, h, w = q.shape
    scores = torch.einsum("bchw,bcij->bhwij", q, k) * (int(c) ** (-0.5))
    weights = F.softmax(torch.reshape(scores, (n, h, w, h * w)), dim=-1)
    return torch.einsum("bhwij,bcij->bchw", torch.reshape(weights, (n, h, w, h, w)), v)


def ddpm(q, k, v):
    n, c, h, w = q.shape
    scores = torch.bmm(q.reshape(n, c, h * w).permute(0, 2, 1), k.reshape(n, c, h * w))
    weights = F.softmax(scores * (int(c) ** (-0.5)), dim=2).permute(0, 2, 1)
    return torch.bmm(v.reshape(n, c, h * w), weights).reshape(n, c, h, w)


def heads_of(x):
    return x.unflatten(1, (HEADS, -1)).flatten(3)


def edm(q, k, v):
    shape = q.shape
    q, k, v = map(heads_of, (q, k, v))
    weights = torch.einsum("nhcq,nhck->nhqk", q, k / k.shape[2] ** 0.5).softmax(dim=-1)
    return torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(shape)


def by_matmul(q, k, v):
    shape = q.shape
    q, k, v = (heads_of(x).transpose(2, 3) for x in (q, k, v))
    weights = torch.softmax(q @ k.transpose(2, 3) / 2, dim=-1)
    return (weights @ v).transpose(2, 3).reshape(shape)


def scaled_parts(q, k, v):
    """The numbers that parts of one map are multiplied by are those of the scores."""
    n, c, h, w = q.shape
    q, k, v = map(heads_of, torch.cat((q, k, v), dim=1).chunk(3, dim=1))
    weights = torch.einsum("nhcq,nhck->nhqk", 0.5 * q, k / 2 * 1.5).softmax(dim=-1)
    return torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(n, c, h, w)


def scaled_parts_that_are_read(q, k, v):
    """Parts times numbers, which are needed themselves."""
    q, k = (x.chunk(2, dim=1) for x in (torch.cat((q, k), dim=1), torch.cat((k, v), dim=1)))
    return 2 * q[0] + q[1] / 4 + F.silu(3 * k[0]) + (k[1] * 2).mean(dim=1, keepdim=True)


def read_twice(q, k, v):
    q, k, v = (heads_of(x).transpose(2, 3) for x in (q, k, v))
    scores = q @ k.transpose(2, 3)
    y = (torch.softmax(scores, dim=-1) @ v).transpose(2, 3)
    return y.reshape(-1, C, 4, 4) + scores.mean(dim=(1, 2, 3), keepdim=True)


def across_channels(q, k, v):
    """Attention between channels, whose vectors are planes."""
    scores = torch.einsum("nchw,ndhw->ncd", q, k) / 16
    return torch.einsum("ncd,ndhw->nchw", scores.softmax(dim=2), v)


def without_softmax(q, k, v):
    shape = q.shape
    q, k, v = map(heads_of, (q, k, v))
    context = torch.einsum("nhdk,nhek->nhde", k, v) / 16
    return torch.einsum("nhde,nhdq->nheq", context, q).reshape(shape)


def only_softmax(q, k, v):
    return (q + k.permute(0, 2, 3, 1).softmax(dim=-1).permute(0, 3, 1, 2)) * v.softmax(dim=-1)


def some_tokens(q, k, v):
    """The images' queries, keys and values do not lie one after another."""
    q, k, v = (heads_of(x).transpose(2, 3) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q[:, :, 2:11], k[:, :, :12], v[:, :, :12])
    return F.pad(y, (0, 0, 3, 4)).transpose(2, 3).reshape(-1, C, 4, 4)


def some_tokens_by_matmul(q, k, v):
    q, k, v = (heads_of(x).transpose(2, 3) for x in (q, k, v))
    weights = torch.softmax(q[:, :, 2:11] @ k[:, :, :12].transpose(2, 3), dim=-1)
    return F.pad(weights @ v[:, :, :12], (0, 0, 3, 4)).transpose(2, 3).reshape(-1, C, 4, 4)


def across_planes(q, k, v):
    """Tokens are channels, and their vectors planes, which are copied."""
    y = F.scaled_dot_product_attention(*(x.flatten(2).unflatten(1, (HEADS, -1)) for x in (q, k, v)))
    return y.reshape(q.shape)


# What is computed by which operations.
FORMS = {
    score_sde: {"attention"},
    ddpm: {"attention"},
    edm: {"attention"},
    by_matmul: {"attention"},
    some_tokens: {"attention"},
    some_tokens_by_matmul: {"product", "softmax"},
    across_planes: {"attention"},
    scaled_parts: {"attention"},
    scaled_parts_that_are_read: set(),
    read_twice: {"product", "softmax"},
    across_channels: {"product", "softmax"},
    without_softmax: {"product"},
    only_softmax: {"softmax"},
}


class Attending(nn.Module):
    def __init__(self, form) -> None:
        super().__init__()
        self.form = form
        self.first = nn.Conv2d(3, C, 3, padding=1)
        self.q, self.k, self.v = (nn.Conv2d(C, C, 1) for _ in range(3))
        self.last = nn.Conv2d(C, 3, 1)

    def forward(self, x):
        h = self.first(x)
        return self.last(h + self.form(self.q(h), self.k(h), self.v(h)))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_forms_of_attention(form):
    torch.manual_seed(0)
    net, x = Attending(form).eval(), torch.randn(3, 3, 4, 4)
    with torch.inference_mode():
        expected = copy.deepcopy(net).double()(x.double())
        for dtype in engine_cases.TYPES:
            plan = CpuPlan(lower(net, (3, 4, 4)), 3, TYPES[dtype])
            plan.load(x)
            plan.run()
            assert (plan.output.double() - expected).norm() <= BOUNDS[dtype] * expected.norm()
    kinds = {cost.kind for cost in plan.costs}
    assert kinds & {"attention", "product", "softmax"} == FORMS[form]
    if form in (score_sde, ddpm, edm, by_matmul):
        assert not [kind for kind in kinds if "torch" in kind]


def rows(*maps):
    return (x.permute(0, 2, 3, 1) for x in maps)


def tokens(*maps):
    return (x.flatten(2).mT for x in maps)


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [
        lambda q, k, v: torch.einsum("nchw,nchw->nchw", q, k) + v,
        lambda q, k, v: torch.einsum("nlc,nlc->nlc", *tokens(q, k)).mT.reshape(q.shape) + v,
        lambda q, k, v: torch.einsum("nhwc,nhwd->nhwcd", *rows(q, k)).sum((3, 4))[:, None] + v,
        lambda q, k, v: torch.einsum("nchw->nhwc", q).permute(0, 3, 1, 2) + k + v,
        lambda q, k, v: torch.einsum("nchw,mchw->nm", q, k).sum() + v,
        lambda q, k, v: torch.einsum("nchw,ndhw->nhw", q, k)[:, None] + v,
        lambda q, k, v: torch.einsum("nc...,nd...->ncd", q, k).sum((1, 2))[:, None, None, None] + v,
        lambda q, k, v: (q.softmax(dim=1) + k.softmax(dim=2)) * v,
    ],
    ids=[
        "pointwise",
        "of tokens",
        "no sum",
        "permutation",
        "between images",
        "sums of one",
        "ellipsis",
        "other axes",
    ],
)
def test_what_is_no_product_of_matrices_is_pytorchs(form):
    torch.manual_seed(0)
    net, x = Attending(form).eval(), torch.randn(2, 3, 4, 4)
    with torch.inference_mode():
        expected = net(x)
        plan = CpuPlan(lower(net, (3, 4, 4), batch=2), 2, torch.float32)
        plan.load(x)
        plan.run()
    assert (plan.output - expected).norm() <= 2e-6 * expected.norm()
    assert "product" not in {cost.kind for cost in plan.costs}
