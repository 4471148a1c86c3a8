"""A prompt that leaves no room for its answer in the model's context is counted and dropped; the run goes on."""

from resources.settings.files import changed_settings
from synpo_assets.method.row_lengths import has_room
from synpo_assets.method.templates import improver_instruction, user_message
from synpo_assets.stages.prompts import room_in
from synpo_assets.stages.seed import room_of
from tests.nano import active_settings


def test_what_has_room_can_be_answered_and_rewritten(nano_checkpoint, tmp_path):
    from resources.models.context import ModelContext

    context = ModelContext(nano_checkpoint.weights, False)
    fits = room_in(nano_checkpoint, active_settings())
    room = room_of(active_settings(), context.length)
    lengths = range(0, 1200, 7)
    longest = max(length for length in lengths if fits("tide " * length))
    assert not any(fits("tide " * length) for length in lengths if length > longest)
    for length in (longest, longest + 7):
        asked = context.tokens(user_message("tide " * length)) + room.answer
        rewritten = context.tokens(improver_instruction("tide " * length, "")) + room.answer + room.rewrite
        assert (max(asked, rewritten) <= context.length) == (length == longest)
    longer = changed_settings(active_settings(), {"responses.sampling.max_new_tokens": 1000}, tmp_path)
    assert not room_in(nano_checkpoint, longer)("tide")


def test_without_an_improver_there_is_no_rewrite_to_leave_room_for():
    from synpo_assets.method.row_lengths import Room

    def letters(messages):
        return sum(len(each["content"]) for each in messages)

    assert has_room("x" * 90, Room(100, 10, None), letters)
    assert not has_room("x" * 91, Room(100, 10, None), letters)
    assert not has_room("x" * 50, Room(100, 10, 10), letters)
