import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch.utils.data
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from coaug_trl import Collection, Document, InputError
from coaug_trl.data.groups import CompositeGroups, Group, GroupCollator, GroupSampler


def make_collection(num_documents, relevant, irrelevant=None):
    """Documents d0, d1, … and queries with the given numbers of documents judged 1, and judged 0."""
    corpus = {f"d{number}": Document(f"d{number}", "", f"text {number}") for number in range(num_documents)}
    qrels = {
        query_id: {f"d{number}": 1 for number in numbers}
        | {f"d{number}": 0 for number in (irrelevant or {}).get(query_id, ()) if number not in numbers}
        for query_id, numbers in relevant.items()
    }
    return Collection("toy", "train", corpus, {query_id: query_id for query_id in qrels}, qrels, ("train",))


def ten_queries(num_documents=60):
    return make_collection(num_documents, {f"q{n}": [3 * n, 3 * n + 1, 3 * n + 2] for n in range(10)})


@st.composite
def grouped_collections(draw):
    num_documents = 60
    numbers = st.lists(st.integers(0, num_documents - 1), max_size=8, unique=True)
    relevant = {f"q{n}": draw(numbers) for n in range(draw(st.integers(1, 12)))}
    judged_zero = {query_id: draw(numbers) for query_id in relevant}
    collection = make_collection(num_documents, relevant, judged_zero)
    num_queries = draw(st.integers(1, 3))
    assume(len(collection.queries_with_relevant) >= num_queries)
    num_relevant = draw(st.integers(1, 4))
    group_size = num_queries * (1 + num_relevant) + draw(st.integers(0, 8))
    return CompositeGroups(
        collection, num_queries, group_size, num_relevant, draw(st.integers(1, 6)), draw(st.integers(0, 5))
    )


def epoch_of(groups, epoch=0):
    first = epoch * len(groups)
    return [groups[position] for position in range(first, first + len(groups))]


@settings(max_examples=150, deadline=None)
@given(grouped_collections(), st.integers(0, 3))
def test_groups_have_the_texts_they_promise(groups, epoch):
    collection = groups.collection
    for group in epoch_of(groups, epoch):
        relevant_to_any = {id_ for query_id in group.queries for id_ in collection.relevant_documents(query_id)}
        assert len(group.queries) == groups.num_queries
        assert len(group.queries) + len(group.documents) == groups.group_size
        assert len(set(group.queries)) == len(group.queries)
        assert len(set(group.documents)) == len(group.documents)
        assert set(group.documents) <= set(collection.corpus)
        relevant, irrelevant = group.documents[: group.num_relevant], group.documents[group.num_relevant :]
        assert set(relevant) <= relevant_to_any
        assert not set(irrelevant) & relevant_to_any
        if groups.num_queries == 1:
            assert group.num_relevant == min(groups.num_relevant, len(relevant_to_any))
        else:
            # each query draws its own, and a document drawn by two of them stands in the group once
            shares = [
                min(groups.num_relevant, len(collection.relevant_documents(query_id))) for query_id in group.queries
            ]
            assert max(shares) <= group.num_relevant <= sum(shares)
            for query_id, share in zip(group.queries, shares, strict=True):
                assert len(set(relevant) & set(collection.relevant_documents(query_id))) >= share


@settings(max_examples=150, deadline=None)
@given(grouped_collections(), st.integers(0, 3))
def test_every_query_with_a_relevant_document_comes_once_an_epoch_and_the_last_batch_is_filled_from_its_start(
    groups, epoch
):
    queries = [query_id for group in epoch_of(groups, epoch) for query_id in group.queries]
    with_relevant = groups.collection.queries_with_relevant
    assert sorted(queries[: len(with_relevant)]) == sorted(with_relevant)
    repeated = queries[len(with_relevant) :]
    assert len(repeated) == groups.num_filled
    assert repeated == [queries[place % len(with_relevant)] for place in range(len(repeated))]
    assert len(groups) % groups.groups_per_batch == 0
    # no batch more than needed
    assert (len(groups) - groups.groups_per_batch) * groups.num_queries < len(with_relevant)


def test_fewer_queries_than_groups_fill_one_batch_with_different_draws():
    groups = CompositeGroups(
        make_collection(500, {"a": [0, 1], "b": [2], "none": []}), group_size=10, groups_per_batch=32
    )
    assert len(groups) == 32
    assert groups.num_filled == 30
    drawn = epoch_of(groups)
    assert Counter(group.queries[0] for group in drawn) == {"a": 16, "b": 16}
    assert len({group.documents for group in drawn}) == 32


def test_queries_without_a_relevant_document_are_left_out():
    groups = CompositeGroups(
        make_collection(30, {"a": [0], "zero": [], "b": [1]}, {"zero": [5]}), group_size=4, groups_per_batch=1
    )
    assert {group.queries[0] for epoch in range(3) for group in epoch_of(groups, epoch)} == {"a", "b"}


def test_a_group_is_a_function_of_seed_and_position():
    groups = CompositeGroups(ten_queries(), group_size=8, groups_per_batch=4, seed=3)
    forward = [groups[position] for position in range(40)]
    again = CompositeGroups(ten_queries(), group_size=8, groups_per_batch=4, seed=3)
    backward = [again[position] for position in reversed(range(40))]
    assert forward == backward[::-1]
    assert [group.position for group in forward] == list(range(40))


def test_epochs_and_seeds_differ_in_order_and_in_draws():
    groups = CompositeGroups(ten_queries(), group_size=8, num_relevant=2, groups_per_batch=5, seed=0)
    other_seed = CompositeGroups(ten_queries(), group_size=8, num_relevant=2, groups_per_batch=5, seed=1)
    for other in (epoch_of(groups, 1), epoch_of(other_seed)):
        assert [group.queries for group in epoch_of(groups)] != [group.queries for group in other]
        documents = {group.queries: set(group.documents) for group in epoch_of(groups)}
        assert sum(documents[group.queries] == set(group.documents) for group in other) == 0


def test_the_same_query_gets_other_documents_with_every_seed_and_position():
    collection = make_collection(60, {"a": [0, 1, 2]})
    drawn = {
        CompositeGroups(collection, group_size=8, groups_per_batch=4, seed=seed)[position].documents
        for seed in range(3)
        for position in range(12)
    }
    assert len(drawn) == 3 * 12


def test_irrelevant_documents_are_drawn_uniformly_from_the_whole_corpus():
    num_documents, num_epochs = 200, 100
    # Half of the corpus is relevant to some query: drawing only from the other half is the published code's fault.
    collection = make_collection(num_documents, {f"q{n}": list(range(5 * n, 5 * n + 5)) for n in range(20)})
    groups = CompositeGroups(collection, group_size=16, num_relevant=5, groups_per_batch=20)
    counts = Counter(
        id_
        for epoch in range(num_epochs)
        for group in epoch_of(groups, epoch)
        for id_ in group.documents[group.num_relevant :]
    )
    share = 10 / (num_documents - 5)
    expected = [num_epochs * share * (19 if number < 100 else 20) for number in range(num_documents)]
    observed = [counts[f"d{number}"] for number in range(num_documents)]
    assert stats.chisquare(observed, expected).pvalue > 1e-4
    # the place in the group tells nothing either
    first = Counter(
        group.documents[group.num_relevant] for epoch in range(num_epochs) for group in epoch_of(groups, epoch)
    )
    assert stats.chisquare([first[f"d{number}"] for number in range(100, 200)]).pvalue > 1e-4


def test_relevant_documents_are_drawn_uniformly_without_replacement():
    groups = CompositeGroups(make_collection(40, {"a": list(range(9))}), group_size=8, num_relevant=3)
    drawn = [groups[position].documents[:3] for position in range(900)]
    assert all(len(set(documents)) == 3 for documents in drawn)
    counts = Counter(id_ for documents in drawn for id_ in documents)
    assert sorted(counts) == [f"d{number}" for number in range(9)]
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_a_document_relevant_to_another_query_of_the_group_is_not_an_irrelevant_one():
    # Of 12 documents 10 are relevant to one of the two queries, so a fault would show in nearly every group.
    collection = make_collection(12, {"a": [0, 1, 2, 3, 4], "b": [5, 6, 7, 8, 9]})
    groups = CompositeGroups(collection, num_queries=2, group_size=6, num_relevant=1, groups_per_batch=10)
    for group in epoch_of(groups):
        assert set(group.documents[2:]) == {"d10", "d11"}


@st.composite
def groups_with_hard_negatives(draw):
    """With lists that hold documents relevant to other queries of the group, too, and are often short or empty."""
    groups = draw(grouped_collections())
    numbers = st.lists(st.integers(0, 59), max_size=12, unique=True)
    mined = {}
    for query_id in groups.query_ids:
        judged = groups.collection.qrels[query_id]
        mined[query_id] = [f"d{number}" for number in draw(numbers) if f"d{number}" not in judged]
    room = groups.group_size - groups.num_queries * (1 + groups.num_relevant)
    settings = (groups.num_queries, groups.group_size, groups.num_relevant, groups.groups_per_batch, groups.seed)
    return CompositeGroups(groups.collection, *settings, draw(st.integers(0, room)), mined)


@settings(max_examples=150, deadline=None)
@given(groups_with_hard_negatives(), st.integers(0, 3))
def test_hard_negatives_come_first_among_the_irrelevant_and_random_documents_fill_up(groups, epoch):
    collection = groups.collection
    without = CompositeGroups(
        collection, groups.num_queries, groups.group_size, groups.num_relevant, groups.groups_per_batch, groups.seed
    )
    for group, plain in zip(epoch_of(groups, epoch), epoch_of(without, epoch), strict=True):
        relevant_to_any = {id_ for query_id in group.queries for id_ in collection.relevant_documents(query_id)}
        mined = {id_ for query_id in group.queries for id_ in groups.hard_negatives[query_id]} - relevant_to_any
        num_hard = min(groups.num_hard_negatives, len(mined))
        irrelevant = group.documents[group.num_relevant :]
        assert set(irrelevant[:num_hard]) <= mined
        assert not set(irrelevant) & relevant_to_any
        assert len(set(group.documents)) == len(group.documents) == groups.group_size - groups.num_queries
        # queries and relevant documents are those of the run without hard negatives
        assert group.queries == plain.queries
        assert group.documents[: group.num_relevant] == plain.documents[: plain.num_relevant]
        if groups.num_hard_negatives == 0:
            assert group == plain


def with_hard_negatives(seed=0, num_hard_negatives=3):
    mined = {f"q{n}": [f"d{30 + (n + place) % 30}" for place in range(12)] for n in range(10)}
    return CompositeGroups(
        ten_queries(),
        group_size=8,
        num_relevant=2,
        groups_per_batch=4,
        seed=seed,
        num_hard_negatives=num_hard_negatives,
        hard_negatives=mined,
    )


def test_without_hard_negatives_groups_are_those_of_earlier_versions():
    groups = CompositeGroups(
        ten_queries(), num_queries=2, group_size=8, num_relevant=2, groups_per_batch=5, seed=3, hard_negatives={}
    )
    assert groups[0] == Group(0, ("q9", "q6"), ("d29", "d28", "d18", "d20", "d5", "d25"), 4)
    assert groups[6] == Group(6, ("q2", "q8"), ("d6", "d8", "d25", "d24", "d13", "d11"), 4)


def test_hard_negatives_are_a_function_of_seed_and_position():
    forward = [with_hard_negatives(seed=3)[position] for position in range(40)]
    again = with_hard_negatives(seed=3)
    assert [again[position] for position in reversed(range(40))] == forward[::-1]
    assert forward != [with_hard_negatives(seed=4)[position] for position in range(40)]
    hard = Counter((group.queries, group.documents[2:5]) for group in forward)
    assert len(hard) > 35  # other ones each time a query comes


def test_hard_negatives_are_drawn_uniformly_without_replacement():
    groups = CompositeGroups(
        make_collection(60, {"a": [0, 1]}),
        group_size=8,
        num_relevant=2,
        num_hard_negatives=3,
        hard_negatives={"a": [f"d{number}" for number in range(20, 30)]},
    )
    drawn = [groups[position].documents[2:5] for position in range(900)]
    assert all(len(set(documents)) == 3 for documents in drawn)
    counts = Counter(id_ for documents in drawn for id_ in documents)
    assert sorted(counts) == [f"d{number}" for number in range(20, 30)]
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_a_document_relevant_to_another_query_of_the_group_is_no_hard_negative():
    collection = make_collection(12, {"a": [0, 1, 2], "b": [3, 4, 5]})
    mined = {"a": ["d3", "d4", "d5", "d6"], "b": ["d0", "d1", "d2", "d6"]}
    groups = CompositeGroups(
        collection, num_queries=2, group_size=8, num_relevant=1, num_hard_negatives=2, hard_negatives=mined
    )
    for group in epoch_of(groups):
        assert group.documents[2] == "d6" and set(group.documents[3:]) <= {f"d{number}" for number in range(7, 12)}


def test_too_few_queries_for_a_group_names_the_setting():
    with pytest.raises(InputError, match=r"toy: .*takes 3 queries.*has 2 .*Set queries_per_group to 2"):
        CompositeGroups(make_collection(30, {"a": [0], "b": [1], "c": []}), num_queries=3)


def test_too_few_documents_for_a_group_names_a_size_that_is_then_accepted():
    collection = make_collection(9, {"a": [0]})
    with pytest.raises(
        InputError, match=r"toy: .*takes 15 documents, but the corpus has 9\. Set group_size to at most 10"
    ):
        CompositeGroups(collection, group_size=16)
    assert len(CompositeGroups(collection, group_size=10, groups_per_batch=1)[0].documents) == 9


@pytest.mark.parametrize("num_hard_negatives", [0, 1, 5])
def test_too_few_irrelevant_documents_says_so(num_hard_negatives):
    groups = CompositeGroups(
        make_collection(10, {"a": list(range(8))}),
        group_size=8,
        num_relevant=2,
        num_hard_negatives=num_hard_negatives,
        hard_negatives={"a": ["d8", "d9"]},
    )
    with pytest.raises(InputError, match=r"toy: only 2 documents are irrelevant to a group that needs 5"):
        groups[0]


def test_drawing_from_a_large_corpus_takes_neither_time_nor_memory_of_its_size():
    collection = make_collection(200_000, {f"q{n}": [n, n + 1] for n in range(10_000)})
    started = time.process_time()
    groups = CompositeGroups(collection, groups_per_batch=32)
    first = groups[0]
    tracemalloc.start()
    try:
        drawn = [groups[position] for position in range(1, 500)]
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        groups[500]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 2
    assert len({first, *drawn}) == 500
    assert held < 1_500_000  # the groups drawn
    assert peak - held < 100_000  # a permutation of the corpus has 1.6 MB


@pytest.mark.parametrize(
    ("augment", "expected"),
    [
        ("query", [("query", "q")]),
        ("document", [("relevant", "d1"), ("relevant", "d2"), ("irrelevant", "d3")]),
        ("both", [("query", "q"), ("relevant", "d1"), ("relevant", "d2"), ("irrelevant", "d3")]),
    ],
)
def test_rows_are_the_texts_of_the_augmented_sides_with_their_types(augment, expected):
    assert Group(0, ("q",), ("d1", "d2", "d3"), 2).rows(augment) == expected


def sampler_of(groups, completions_per_group=6, repeat_count=3, epoch=0):
    return GroupSampler(groups, completions_per_group, repeat_count, lambda: epoch)


@pytest.mark.parametrize("epoch", [0, 2])
def test_the_sampler_repeats_each_generation_batch_and_keeps_a_groups_completions_together(epoch):
    groups = CompositeGroups(ten_queries(), group_size=5, groups_per_batch=4)
    sampler = sampler_of(groups, completions_per_group=6, repeat_count=3, epoch=epoch)
    positions = list(sampler)
    assert len(positions) == len(sampler)
    batches = np.array(positions).reshape(-1, 4 * 6)
    assert len(batches) == 3 * 3
    for number, batch in enumerate(batches):
        first = epoch * len(groups) + number // 3 * 4
        assert batch.tolist() == np.repeat(np.arange(first, first + 4), 6).tolist()


def loader_of(groups, completions_per_group, repeat_count, current_epoch, num_processes=1, process=0):
    """A process's loader as the trainer and accelerate make it: a generation batch's share at a time."""
    sampler = GroupSampler(groups, completions_per_group, repeat_count, current_epoch)
    share = groups.groups_per_batch * completions_per_group // num_processes
    batches = torch.utils.data.BatchSampler(sampler, share, drop_last=False)
    if num_processes > 1:
        batches = BatchSamplerShard(batches, num_processes, process)
    return torch.utils.data.DataLoader(groups, batch_sampler=batches, collate_fn=GroupCollator(completions_per_group))


@pytest.mark.parametrize("num_processes", [2, 4])
def test_groups_with_hard_negatives_are_the_same_for_any_number_of_processes(num_processes):
    alone = [group for batch in loader_of(with_hard_negatives(), 6, 1, lambda: 1) for group in batch]
    loaders = [
        loader_of(with_hard_negatives(), 6, 1, lambda: 1, num_processes, process) for process in range(num_processes)
    ]
    assert [group for shares in zip(*loaders, strict=True) for share in shares for group in share] == alone


@settings(max_examples=25, deadline=None)
@given(
    num_processes=st.sampled_from([1, 2, 4]),
    groups_per_process=st.integers(1, 3),
    completions_per_group=st.integers(1, 7),
    repeat_count=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_processes_share_each_generation_batch_group_by_group(
    num_processes, groups_per_process, completions_per_group, repeat_count, seed
):
    groups = CompositeGroups(
        ten_queries(), group_size=5, groups_per_batch=num_processes * groups_per_process, seed=seed
    )
    loaders = [
        loader_of(groups, completions_per_group, repeat_count, lambda: 1, num_processes, process)
        for process in range(num_processes)
    ]
    alone = list(loader_of(groups, completions_per_group, repeat_count, lambda: 1))
    shared = list(zip(*loaders, strict=True))
    assert len(alone) == len(shared) == len(groups) // groups.groups_per_batch * repeat_count
    for read, (batch, shares) in enumerate(zip(alone, shared, strict=True)):
        assert all(len(share) == groups_per_process for share in shares)
        assert [group for share in shares for group in share] == batch
        first = len(groups) + read // repeat_count * groups.groups_per_batch
        assert [group.position for group in batch] == list(range(first, first + groups.groups_per_batch))


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("step", [1, 5, 6, 11, 13])
def test_a_run_taken_up_inside_an_epoch_reads_on_as_if_it_had_not_stopped(num_processes, step):
    steps_per_epoch = 6  # three generation batches, read twice

    def loader(process, current_step):
        groups = CompositeGroups(ten_queries(), group_size=5, groups_per_batch=4, seed=7)
        return loader_of(groups, 6, 2, lambda: current_step // steps_per_epoch, num_processes, process)

    for process in range(num_processes):
        whole = [batch for epoch in range(3) for batch in loader(process, epoch * steps_per_epoch)]
        resumed = list(skip_first_batches(loader(process, step), step % steps_per_epoch))
        for epoch in range(step // steps_per_epoch + 1, 3):
            resumed += loader(process, epoch * steps_per_epoch)
        assert resumed == whole[step:]
        assert whole[:steps_per_epoch] != whole[steps_per_epoch : 2 * steps_per_epoch]


@pytest.mark.parametrize("positions", [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1], [0, 0]])
def test_the_collator_refuses_a_part_of_a_group(positions):
    groups = CompositeGroups(ten_queries(), group_size=5, groups_per_batch=4)
    with pytest.raises(ValueError, match="part of a group"):
        GroupCollator(3)([groups[position] for position in positions])


def test_the_collator_folds_completions_into_groups():
    groups = CompositeGroups(ten_queries(), group_size=5, groups_per_batch=4)
    assert GroupCollator(3)([groups[position] for position in (1, 1, 1, 2, 2, 2)]) == [groups[1], groups[2]]
