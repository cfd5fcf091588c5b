"""Which sequences are kept, where, and which are forgotten first."""

from hypothesis import given
from hypothesis import strategies as st

from protocols.rollout_state import TokenIds
from worker.engines.torch_engine.prefix_tree import PrefixTree


def ids(text: str) -> TokenIds:
    """A token a character."""
    return TokenIds(map(ord, text))


def tree(*texts: str, capacity: int = 100) -> PrefixTree:
    made = PrefixTree(capacity)
    for text in texts:
        made.add(ids(text))
    return made


def test_a_sequence_is_known_as_far_as_it_agrees_with_one_that_is_kept() -> None:
    made = tree("the rain in spain", "the rainbow", "the end")
    for text, known in (
        ("the rain in spain stays", 17),
        ("the rainbows", 11),
        ("the en", 6),
        ("the rail", 7),
        ("the", 3),
        ("rain", 0),
        ("", 0),
    ):
        assert made.known(ids(text)) == known, text


def test_what_is_kept_lies_where_it_was_put() -> None:
    made = tree()
    first = made.add(ids("abcdef"))
    assert (first.start, len(first.places)) == (0, 6)
    second = made.add(ids("abcxy"))
    assert (second.start, len(second.places)) == (3, 2)
    assert made.find(ids("abcdef")) == first.places
    assert made.find(ids("abcxyz")) == first.places[:3] + second.places


def test_a_beginning_of_what_is_kept_takes_no_room() -> None:
    made = tree("abcdef")
    assert made.add(ids("abcd")).places == []
    assert made.tokens == 6


def test_what_was_used_longest_ago_goes_first_and_from_its_end() -> None:
    made = tree("aaaa", "bbbb", capacity=8)
    made.find(ids("aaaa"))
    made.add(ids("cc"))
    assert [made.known(ids(one * 4)) for one in "abc"] == [4, 2, 2]
    made.add(ids("dddd"))
    assert [made.known(ids(one * 4)) for one in "abcd"] == [2, 0, 2, 4]


def test_what_others_go_on_from_stays_as_long_as_they_do() -> None:
    made = tree("xxa", "xxb", capacity=6)
    made.find(ids("xx"))
    made.add(ids("yyy"))
    assert [made.known(ids(one)) for one in ("xxa", "xxb", "yyy")] == [2, 3, 3]


def test_a_sequence_longer_than_all_room_is_kept_in_part() -> None:
    made = tree("other", capacity=6)
    assert len(made.add(ids("0123456789")).places) == 6
    assert made.known(ids("0123456789")) == 6
    assert len(made.add(ids("012345abc")).places) == 0
    assert PrefixTree(0).add(ids("a")).places == []


def test_what_a_sequence_goes_on_from_makes_no_room_for_it() -> None:
    made = tree("abc", capacity=5)
    assert len(made.add(ids("abcdefgh")).places) == 2
    assert made.known(ids("abcdefgh")) == 5


def test_nothing_is_known_after_clear() -> None:
    made = tree("abc")
    made.clear()
    assert (made.known(ids("abc")), made.tokens) == (0, 0)
    assert sorted(made.add(ids("abcd")).places) == [0, 1, 2, 3]


@given(
    capacity=st.integers(0, 24),
    orders=st.lists(
        st.tuples(st.sampled_from(["add", "find"]), st.text("ab", max_size=12)), max_size=40
    ),
)
def test_no_place_is_given_to_two_and_the_newest_is_kept_as_far_as_there_is_room(
    capacity: int, orders: list[tuple[str, str]]
) -> None:
    made = PrefixTree(capacity)
    held: dict[int, str] = {}
    """What a place holds: the sequence up to and with its token."""
    for order, text in orders:
        known = made.known(ids(text))
        if order == "add":
            added = made.add(ids(text))
            assert added.start == known
            for at, place in enumerate(added.places, start=added.start):
                assert place < capacity
                held[place] = text[: at + 1]
            assert made.known(ids(text)) == min(len(text), capacity)
        places = made.find(ids(text))
        assert len(places) == made.known(ids(text)) >= known
        assert [held[place] for place in places] == [text[: i + 1] for i in range(len(places))]
        assert made.tokens <= capacity
