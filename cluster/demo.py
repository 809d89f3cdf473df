"""`make demo`: starts everything, asks about a sample image over the public API, shows the accounting, stops."""

from __future__ import annotations

import argparse
import pathlib
import sys

from cluster.checks import REPOSITORY, ClusterError
from cluster.interrupts import signals_interrupt
from cluster.local import LocalCluster
from focusllava import Answer, FocusClient, FocusClientError
from focusllava.messages import Settings
from services.common.errors import FocusError

SAMPLE = REPOSITORY / "docs" / "assets" / "sample.png"
QUESTION = "What number is on the red card?"
SECOND_QUESTION = "What word is on the yellow card?"
OFF: Settings = {"vision_sampler": False, "text_sampler": False}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.demo", description=__doc__)
    parser.add_argument("--checkpoint", help="folder; default: FOCUSLLAVA_CHECKPOINT, then the shipped one")
    parser.add_argument("--image", type=pathlib.Path, default=SAMPLE)
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--second-question", default=SECOND_QUESTION)
    options = parser.parse_args(argv)
    try:
        image = options.image.read_bytes()
        with signals_interrupt(), LocalCluster(checkpoint=options.checkpoint, grpc_port=0, timeout_s=300) as cluster:
            cluster.start(lambda line: print(f"demo: {line}", flush=True))
            with FocusClient(cluster.grpc_address, timeout_s=120) as client:
                show(client, options.image.name, image, options.question, options.second_question)
            print("demo: stopping what was started", flush=True)
    except (ClusterError, FocusError, FocusClientError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; what was started is stopped", file=sys.stderr)
        return 130
    print("demo: done. `make serve` leaves it running; then: .venv/bin/focusllava ask IMAGE QUESTION")
    return 0


def show(client: FocusClient, name: str, image: bytes, question: str, second_question: str) -> None:
    """Three questions: samplers on, samplers off, and another one about the image that the server now knows."""
    _warm_up(client, image, question)
    model = client.model_info()
    print(f"\nmodel  {model.name}: {model.text_family}, {model.num_layers} layers, {model.model_fingerprint[:12]}")
    print(f"image  {name}, {len(image) / 1024:.0f} KiB")
    on = _stream(client, image, question, "both samplers on", {})
    off = _stream(client, image, question, "the same, samplers off", OFF)
    print()
    _print_table(on, off)
    second = _stream(client, image, second_question, "same image, another question", {})
    cached = all(part.cached for part in second.images)
    print(f"  visual tokens from the cache: {'yes' if cached else 'NO'}", end="")
    print(
        f"; first token {second.usage.time_to_first_token_ms:.0f} ms, {on.usage.time_to_first_token_ms:.0f} ms before\n"
    )


def _warm_up(client: FocusClient, image: bytes, question: str) -> None:
    # The same picture under another hash (readers ignore bytes after its end) warms both stages, and the sample itself
    # stays out of the cache.
    again = image + b"\0"
    client.ask(again, question, max_tokens=1).result()
    client.ask(again, question, max_tokens=1, vision_sampler=False, text_sampler=False).result()


def _stream(client: FocusClient, image: bytes, question: str, title: str, settings: Settings) -> Answer:
    print(f"\nQ  {question}   [{title}]\nA  ", end="", flush=True)
    with client.ask(image, question, **settings) as stream:
        for text in stream:
            print(text, end="", flush=True)
        print()
        return stream.result()


def _print_table(on: Answer, off: Answer) -> None:
    a, b = on.usage, off.usage
    rows = [
        ("", "both on", "off"),
        ("visual tokens, uncompressed", a.visual_tokens_uncompressed, b.visual_tokens_uncompressed),
        ("after the vision-guided sampler", a.visual_tokens_sampled, b.visual_tokens_sampled),
        (f"kept from layer {a.prune_layer} of {a.num_layers} on", a.visual_tokens_kept, b.visual_tokens_kept),
        ("converted share", f"{a.converted_share_percent:.1f} %", f"{b.converted_share_percent:.1f} %"),
        ("KV cache", f"{a.kv_bytes / 1024:.0f} KiB", f"{b.kv_bytes / 1024:.0f} KiB"),
        ("time to first token", f"{a.time_to_first_token_ms:.0f} ms", f"{b.time_to_first_token_ms:.0f} ms"),
    ]
    for label, left, right in rows:
        print(f"  {label:<34}{left:>10}{right:>10}")


if __name__ == "__main__":
    sys.exit(main())
