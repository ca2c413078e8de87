"""Generation by a server that speaks the OpenAI protocol."""

import asyncio
import itertools
import os
import random
from collections.abc import Iterable
from typing import Any

from ...policy.settings import GenerationSettings
from ...utils.errors import InputError
from ...utils.terminal import note
from .base import Completion, Completions, Prompts, process_index


# Waits between attempts at a server double from the first to the longest: two minutes in all.
SERVER_ATTEMPTS, FIRST_WAIT, LONGEST_WAIT = 10, 0.5, 30.0
SERVER_TIMEOUT, CONNECT_TIMEOUT, TIMEOUTS = 600.0, 10.0, 2


class ServerEngine:
    """
    Generates with a server that speaks the OpenAI protocol for completions and takes token ids, such as `vllm serve`.

    A request that fails by connection, overload or a fault of the server is repeated, after waits that double.

    Args:
        url: Of the server, with or without `/v1`. `OPENAI_API_KEY` of the environment is its key, if it needs one.
        model: Name the server has the model under; another one is taken where the server has no other.
        concurrency: Requests at once.

    Raises `InputError`: No server answers, it does not have the model, it refuses a request, or it stays down.
    """

    name = "server"
    dtype = "of the server"

    def __init__(self, url: str, model: str, concurrency: int = 64):
        import httpx

        if concurrency < 1:
            raise InputError(f"The concurrency is {concurrency}; use at least 1, such as 64.")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.width = concurrency
        try:
            response = httpx.get(f"{self.url}/v1/models", headers=self._headers(), timeout=30)
            response.raise_for_status()
            served = [entry["id"] for entry in response.json()["data"]]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{url}: no server with the OpenAI protocol answers there ({error}); start one, such as vllm serve "
                f"{model}, and give its address, such as http://localhost:8000."
            ) from None
        if model not in served and len(served) != 1:
            raise InputError(
                f"{url} serves {', '.join(served) or 'no model'}, and the model is {model}; let the server call it by "
                "this name (vLLM: --served-model-name, for an adapter --lora-modules)."
            )
        self.model = model if model in served else served[0]
        if self.model != model and process_index() == 0:
            note(f"{url} serves {self.model}, which is taken to be {model}")

    def complete(
        self, prompts: Prompts, generation: GenerationSettings, temperature: float = 0.0, seed: int = 0
    ) -> Completions:
        """As the module says."""
        import httpx

        request = {
            "model": self.model,
            "temperature": temperature,
            "seed": seed,
            "max_tokens": generation.max_new_tokens,
            "repetition_penalty": generation.repetition_penalty,
        }
        limits = httpx.Limits(max_connections=self.width, max_keepalive_connections=self.width)
        client = httpx.AsyncClient(
            headers=self._headers(), timeout=httpx.Timeout(SERVER_TIMEOUT, connect=CONNECT_TIMEOUT), limits=limits
        )
        prompts, running = iter(prompts), {}
        with asyncio.Runner() as runner:  # at the end, or when interrupted, it cancels what is running
            try:
                while True:
                    for tag, ids in itertools.islice(prompts, self.width - len(running)):
                        running[runner.get_loop().create_task(self._post(client, request | {"prompt": ids}))] = tag
                    if not running:
                        return
                    finished = runner.run(_finished(running, asyncio.FIRST_COMPLETED))
                    if any(task.exception() for task in finished):
                        finished = runner.run(_finished(running, asyncio.ALL_COMPLETED))
                    # Those that have failed last: what the others brought is not lost.
                    for task in sorted(finished, key=lambda task: task.exception() is not None):
                        yield running.pop(task), task.result()
            finally:
                runner.run(_close(client, running))

    async def _post(self, client: Any, request: dict[str, Any]) -> Completion:
        import httpx

        timeouts = 0
        for attempt in range(SERVER_ATTEMPTS):
            if attempt:
                wait = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
                await asyncio.sleep(wait * random.uniform(0.5, 1.5))  # so that not all ask again at once
            try:
                response = await client.post(f"{self.url}/v1/completions", json=request)
            except httpx.TransportError as error:
                fault = f"{type(error).__name__}: {error}".removesuffix(": ")
                timeouts += isinstance(error, httpx.ReadTimeout)
                if timeouts == TIMEOUTS:
                    break
                continue
            if response.status_code in (408, 429) or response.status_code >= 500:
                fault = f"status {response.status_code}"
                continue
            try:
                response.raise_for_status()
                content = response.json()
                text, num_tokens = content["choices"][0]["text"], content["usage"]["completion_tokens"]
                if not isinstance(text, str):
                    raise TypeError
                return Completion(text, num_tokens)
            except (httpx.HTTPStatusError, ValueError, KeyError, IndexError, TypeError):
                raise InputError(
                    f"{self.url} refuses a prompt of {len(request['prompt']):,} tokens, or answers what is not a "
                    f"completion: status {response.status_code}, {response.text[:500]}"
                ) from None
        raise InputError(
            f"{self.url} stays down ({fault}, after {attempt + 1} attempts); what has been generated is saved, and "
            "the same command goes on when the server is back."
        )

    @staticmethod
    def _headers() -> dict[str, str]:
        key = os.environ.get("OPENAI_API_KEY")
        return {"Authorization": f"Bearer {key}"} if key else {}


async def _finished(tasks: Iterable[asyncio.Task], when: str) -> set[asyncio.Task]:
    finished, _ = await asyncio.wait(tasks, return_when=when)
    return finished


async def _close(client: Any, tasks: Iterable[asyncio.Task]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.aclose()
