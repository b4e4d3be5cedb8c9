import torch

from rep_plugin.pruning.tracing.labels import FIXED, Channels, compress, connected


def test_connected_against_a_plain_search():
    generator = torch.Generator().manual_seed(0)
    for count, number in ((1, 0), (10, 4), (200, 150), (500, 900)):
        edges = torch.randint(count, (2, number), generator=generator)
        parent = list(range(count))

        def find(i, parent=parent):
            while parent[i] != i:
                i = parent[i]
            return i

        for a, b in edges.T.tolist():
            a, b = sorted((find(a), find(b)))
            parent[b] = a
        expected = [find(i) for i in range(count)]
        assert connected(count, [(edges[0], edges[1])] if number else []).tolist() == expected


def test_a_long_path_is_one_component():
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    assert connected(1000, [(order[:-1], order[1:])]).max() == 0


def test_along_and_varying():
    channels = Channels()
    first = channels.fresh(3)
    labels = first.view(1, 3, 1).expand(2, 3, 4)
    assert channels.varying(labels) == [1]
    assert channels.along(labels, 1).tolist() == first.tolist()
    assert channels.along(labels, 2) is None
    channels.tie_along(labels, 1, "a test")
    assert channels.varying(labels) == [] and len(channels.roots()[first].unique()) == 1


def test_a_frozen_product_freezes_its_owners():
    channels = Channels()
    owners = channels.fresh(2)
    product = channels.product(owners[[0, 0, 1, 1]], owners[[0, 1, 0, 1]])
    channels.freeze(product[3:], "test")
    frozen = torch.cat([labels for labels, _ in channels.frozen]).unique().tolist()
    assert owners[1].item() in frozen and owners[0].item() not in frozen


def test_compress_keeps_the_labels():
    labels = torch.arange(6).view(1, 6, 1, 1).expand(2, 6, 3, 3).contiguous()
    small = compress(labels)
    assert torch.equal(small, labels) and small.stride()[2:] == (0, 0) and FIXED == 0
