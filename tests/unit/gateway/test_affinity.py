"""A conversation's turns go where its beginning is; a busy or lost owner passes them on, and only its own ones."""

from __future__ import annotations

import asyncio
import collections
import contextlib

from focusllava.v1 import llm_pb2
from services.common.telemetry import Metrics
from services.gateway.affinity import beginning_of, ranked
from services.gateway.replicas import Replica, ReplicaWay
from services.gateway.stages import LanguageModelClient, StageAddress
from tests.fakes.stages import METRICS, WORDS, LanguageModel
from tests.unit.gateway.test_replicas import Known, calling, owned_by, replica, text

IMAGES = [f"image-{number}" for number in range(3000)]


def replicas(count: int) -> list[Replica]:
    return [Replica(name=f"replica-{number}", address="127.0.0.1:1", secret="") for number in range(count)]


def owners(images: list[str], known: list[Replica]) -> list[str]:
    return [ranked(known, image)[0].name for image in images]


def test_beginnings_are_shared_out_and_the_order_of_the_names_is_of_no_account():
    known = replicas(3)
    shares = collections.Counter(owners(IMAGES, known))
    assert len(shares) == 3 and all(900 < share < 1100 for share in shares.values())
    assert owners(IMAGES, known[::-1]) == owners(IMAGES, known)


def test_a_replica_that_comes_or_goes_moves_its_own_share_alone():
    three, four = owners(IMAGES, replicas(3)), owners(IMAGES, replicas(4))
    moved = [(before, after) for before, after in zip(three, four, strict=True) if before != after]
    assert {after for _, after in moved} == {"replica-3"} and 650 < len(moved) < 850


def request(*turns: tuple[int, str]) -> llm_pb2.GenerateRequest:
    made = [llm_pb2.PromptTurn(role=role, parts=[llm_pb2.PromptPart(text=words)]) for role, words in turns]
    return llm_pb2.GenerateRequest(turns=made)


def test_what_a_prompt_begins_with():
    system, user, assistant = llm_pb2.ROLE_SYSTEM, llm_pb2.ROLE_USER, llm_pb2.ROLE_ASSISTANT
    first = request((system, "Be brief."), (user, "Who?"))
    later = request((system, "Be brief."), (user, "Who?"), (assistant, "I."), (user, "Why?"))
    assert beginning_of(first, ()) == beginning_of(later, ()) != ""
    assert beginning_of(request((system, "Be long."), (user, "Who?")), ()) != beginning_of(first, ())
    assert beginning_of(later, ["an image", "another"]) == "an image"
    assert beginning_of(llm_pb2.GenerateRequest(raw_prompt=llm_pb2.RawPrompt(text="Once")), ()) == ""


async def test_turns_of_a_conversation_go_to_one_replica_in_every_gateway():
    models = {"a": LanguageModel(), "b": LanguageModel()}
    async with replica(models["a"], "a") as (_, a), replica(models["b"], "b") as (_, b):
        async with calling(Known(a, b)) as one, calling(Known(b, a)) as other:
            for owner in ("a", "b", "a"):
                for _ in range(5):
                    assert await text(one, owned_by(owner, a, b)) == "".join(WORDS)
                    assert await text(other, owned_by(owner, a, b)) == "".join(WORDS)
            assert [len(models[name].requests) for name in ("a", "b")] == [20, 10]
            for turns in range(1, 5):
                await text(one, "", *(f"turn {number}" for number in range(turns)))
    assert sorted(len(model.requests) for model in models.values()) in ([10, 24], [14, 20])


async def test_without_affinity_calls_are_shared_out():
    models = [LanguageModel(pause_s=0.05), LanguageModel(pause_s=0.05)]
    async with replica(models[0], "a") as (_, a), replica(models[1], "b") as (_, b):
        async with calling(Known(a, b), affinity=None) as client:
            await asyncio.gather(*(text(client, "image") for _ in range(10)))
    assert [len(model.requests) for model in models] == [5, 5]


async def test_a_busy_owner_passes_on_what_is_beyond_its_share():
    """Ten at once about one image: 1.25 times the mean of two replicas, rounded up, is 7."""
    counted: collections.Counter[str] = collections.Counter()

    class Counting(Metrics):
        def count(self, name: str, amount: float = 1, **tags: str) -> None:
            super().count(name, amount, **tags)
            counted[tags.get("to", name)] += 1

    models = {"a": LanguageModel(pause_s=0.05), "b": LanguageModel(pause_s=0.05)}
    async with replica(models["a"], "a") as (_, a), replica(models["b"], "b") as (_, b):
        client = LanguageModelClient(StageAddress(application="llm"), Counting("gateway"), Known(a, b))
        image = owned_by("a", a, b)
        await asyncio.gather(*(text(client, image) for _ in range(10)))
        assert [len(models[name].requests) for name in ("a", "b")] == [7, 3]
        await text(client, image)
        assert len(models["a"].requests) == 8, "it is free again"
        await client.close()
    assert counted == {"owner": 8, "next": 3}


async def test_a_lost_owner_passes_on_its_conversations_and_has_them_back():
    models = {"a": LanguageModel(), "b": LanguageModel()}
    async with replica(models["b"], "b") as (_, b):
        async with replica(models["a"], "a") as (_, a):
            known = Known(a, b)
            async with calling(known) as client:
                image = owned_by("a", a, b)
                await text(client, image)
                known.replicas[:] = [b]  # as one that is drained: it is named no more
                await text(client, image)
                known.replicas[:] = [a, b]
                await text(client, image)
        assert [len(models[name].requests) for name in ("a", "b")] == [2, 1]
        async with calling(Known(a, b)) as client:  # named still, and gone
            assert await text(client, image) == "".join(WORDS)
    assert [len(models[name].requests) for name in ("a", "b")] == [2, 2]


async def test_the_way_of_the_encoder_knows_no_owner():
    async with replica(LanguageModel(), "a") as (_, a), replica(LanguageModel(), "b") as (_, b):
        way = ReplicaWay("encoder", Known(a, b), METRICS, affinity=1.25)
        async with contextlib.AsyncExitStack() as stack:
            lines = [await stack.enter_async_context(way.line(1.0)) for _ in range(10)]
            assert sorted(line.calls for line in set(lines)) == [5, 5]
        await way.close()
