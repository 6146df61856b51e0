"""Batches whose rows belong to the examples by an index, in the forms that libraries give them."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from use_oracle import numbers

NODES = (3, 2, 4, 5)


@dataclass(repr=False, eq=False, slots=True)
class Graphs:
    """Joined graphs as an object with slots, as libraries for molecules have them."""

    nodes: torch.Tensor
    edges: torch.Tensor
    edge_index: torch.Tensor
    reverse: torch.Tensor
    owner: torch.Tensor
    count: int = field(default=0)

    def __len__(self):
        return self.count


class Labelled(NamedTuple):
    graphs: Graphs
    weights: torch.Tensor | None
    y: torch.Tensor


def ring(size, offset, seed):
    """Nodes of one graph, and its edges there and back around a ring."""
    ends = torch.arange(size)
    edges = torch.stack([torch.stack([ends, ends.roll(-1)]), torch.stack([ends.roll(-1), ends])], 2).flatten(
        1
    )
    return numbers(size, 3, seed=seed), edges + offset


def join(kept=(0, 1, 2, 3)):
    """A batch of some of the graphs, as a collate function makes it."""
    nodes, edges, owner, offset = [], [], [], 0
    for place, number in enumerate(kept):
        x, e = ring(NODES[number], offset, number)
        nodes.append(x)
        edges.append(e)
        owner += [place] * len(x)
        offset += len(x)
    index = torch.cat(edges, 1)
    reverse = torch.arange(index.shape[1]).view(-1, 2).flip(1).flatten()
    features = index.sum(0)[:, None] * 0.0 + torch.cat([numbers(2 * NODES[n], 2, seed=9 + n) for n in kept])
    graphs = Graphs(torch.cat(nodes), features, index, reverse, torch.tensor(owner), len(list(kept)))
    return Labelled(graphs, None, numbers(len(NODES))[list(kept)])


class GraphNet(nn.Module):
    """Messages along edges, summed at nodes in two ways, and the mean over each graph."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(7, 4)
        self.head = nn.Linear(4, 1)
        self.double()

    def forward(self, graphs):
        source, target = graphs.edge_index
        start = self.first(torch.cat([graphs.nodes[source], graphs.edges], 1))
        messages = torch.tanh(start)
        into = target[:, None].repeat(1, 4)
        empty = messages.new_zeros(len(graphs.nodes), 4)
        at_nodes = empty.scatter_reduce_(0, into, messages, reduce="sum", include_self=False)
        messages = torch.tanh(start + self.again(at_nodes[source] - messages[graphs.reverse]))
        at_nodes = torch.zeros_like(empty).index_add(0, target, messages)
        hidden = torch.tanh(self.last(torch.cat([graphs.nodes, at_nodes], 1)))
        whole = hidden.new_zeros(len(graphs), 4).index_add_(0, graphs.owner, hidden)
        sizes = torch.bincount(graphs.owner)[:, None]
        return self.head(whole / sizes).squeeze(1)
