"p-Laplacian attention against torch-geometric, edge by edge, and against finite differences."

import pytest
import torch
from torch_geometric.nn import MessagePassing

from vlmadapt.models.blocks import attention_matrix
from vlmadapt.models.p_laplacian import plap_attention


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def heads(B=2, H=3, N1=5, N2=7, D=4):
    mask = torch.ones(N1, N2, dtype=torch.bool).triu(3)
    M = attention_matrix(normal(B, H, N1, D, seed=3), normal(B, H, N2, D, seed=4), mask)
    return M, normal(B, H, N1, D, seed=5), normal(B, H, N2, D, seed=6), normal(H, D, 6, seed=7)


class PLaplacianConv(MessagePassing):
    "One step of eq. 11 to 13, edge by edge."

    def __init__(self, p, mu):
        super().__init__(aggr="sum")
        self.p = p
        self.mu = mu

    def forward(self, x, edge_index, weight, degree):
        source, target = edge_index
        scaled = x / degree.sqrt()[:, None]
        gap = (scaled[target] - scaled[source]).square().sum(1)
        bar = weight ** (self.p / 2) * gap ** ((self.p - 2) / 2)
        near = torch.zeros(len(x), dtype=x.dtype).index_add(0, target, bar / degree[target])
        alpha = 1 / (near + 2 * self.mu / self.p)
        w = bar / (degree[target] * degree[source]).sqrt()
        message = self.propagate(edge_index, x=x, w=w)
        return alpha[:, None] * (message + 2 * self.mu / self.p * x)

    def message(self, x_j, w):
        return w[:, None] * x_j


def by_edges(M, q, v, p, mu, degree, root):
    B, H, N1, N2 = M.shape
    nodes = (torch.cat([q, v], -2) @ root).reshape(B * H, N1 + N2, -1)
    found = []
    for m, x in zip(M.reshape(-1, N1, N2), nodes, strict=True):
        i, j = m.nonzero().T
        weight = torch.cat([m[i, j], m[i, j]])
        source, target = torch.cat([j + N1, i]), torch.cat([i, j + N1])
        D = torch.ones(N1 + N2, dtype=x.dtype)
        if degree == "full":
            D = torch.zeros_like(D).index_add(0, target, weight)
        D = torch.where(D > 0, D, 1.0)
        out = PLaplacianConv(p, mu)(x, torch.stack([source, target]), weight, D)
        found.append(out[:N1])
    return torch.stack(found).reshape(B, H, N1, -1)


def with_gradients(form, M, q, v, p, mu):
    leaves = [M, q, v, torch.tensor(p, dtype=M.dtype), torch.tensor(mu, dtype=M.dtype)]
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = form(*leaves)
    gradients = torch.autograd.grad((out * normal(*out.shape, seed=8)).sum(), leaves)
    return [out.detach(), gradients[0] * (M > 0), *gradients[1:]]


@pytest.mark.parametrize("degree", ["none", "full"])
@pytest.mark.parametrize("p", [1.0, 1.25, 1.75, 2.0, 2.5])
def test_values_and_gradients_are_those_of_message_passing(degree, p):
    M, q, v, root = heads()

    def efficient(M, q, v, p, mu):
        return plap_attention(M, q, v, p, mu, degree, root @ root.mT)[0] @ root

    def edges(M, q, v, p, mu):
        return by_edges(M, q, v, p, mu, degree, root)

    found = with_gradients(efficient, M, q, v, p, 0.2)
    expected = with_gradients(edges, M, q, v, p, 0.2)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-10 * theirs.abs().max()


@pytest.mark.parametrize("degree", ["none", "full"])
def test_gradients_are_those_of_finite_differences(degree):
    M, q, v, root = heads()
    M, q, v, metric = M[:1, :1], q[:1, :1], v[:1, :1], (root @ root.mT)[:1]

    def nodes(q, v, p, mu):
        return plap_attention(M, q, v, p, mu, degree, metric)[0]

    def scores(s):
        return plap_attention(s.softmax(-1), q, v, 1.3, 0.2, degree, metric)[0]

    numbers = [torch.tensor(x, dtype=M.dtype, requires_grad=True) for x in (1.3, 0.2)]
    leaves = (q.clone().requires_grad_(), v.clone().requires_grad_(), *numbers)
    assert torch.autograd.gradcheck(nodes, leaves)
    assert torch.autograd.gradcheck(scores, normal(1, 1, 5, 7).requires_grad_())
