"""S0 tuning: learn the initial states of a frozen hybrid model from a few verified solutions."""

import contextlib
import functools
import numbers
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch

from s0kernels.config import S0Config
from s0kernels.modules.swap import base_model
from s0kernels.states import S0States
from s0kernels.tuning import checks
from s0kernels.tuning.batches import Batch, make_batches
from s0kernels.tuning.chat import end_token
from s0kernels.tuning.checkpoint import Checkpoint, describe_run
from s0kernels.tuning.collect import collect, collect_from
from s0kernels.tuning.data import Example, Examples, read_tasks
from s0kernels.tuning.deciding import Work
from s0kernels.tuning.evaluation import Evaluation, digest, evaluate, evaluation
from s0kernels.tuning.forwards import Asked
from s0kernels.tuning.holder import Holder
from s0kernels.tuning.loading import bars_where_watched, find_model, load_tokenizer
from s0kernels.tuning.loop import Callback, Frozen, Learner
from s0kernels.tuning.losses import mean_losses
from s0kernels.tuning.memory import Make, most_tokens
from s0kernels.tuning.problems import chats, prompt_format, read_problems
from s0kernels.tuning.processes import processes
from s0kernels.tuning.sampling import Sampler, end_tokens
from s0kernels.tuning.settings import Sampling
from s0kernels.tuning.verify.checkers import Checker


class S0Trainer(Holder):
    """Trains the initial states of a model, and uses them. The API of the `s0-tuning` package.

    Args:
        model: a causal language model of transformers, of a supported family. Its mixers are swapped in place.
        tokenizer: its tokenizer.
        config: settings; the defaults are those of the method.

    The base weights get no gradient and do not change. Started in several processes (`accelerate launch`, `torchrun`),
    each trains on a share of the batches and all end with the same states.
    """

    @classmethod
    def from_pretrained(cls, model_name: str, config: S0Config | None = None, **model_kwargs: Any) -> "S0Trainer":
        """Load model and tokenizer through transformers' Auto classes.

        `model_kwargs` go to `AutoModelForCausalLM.from_pretrained`. Unless they say otherwise the model is bf16 spread
        by `device_map="auto"` where there is a GPU, and fp32 on the CPU where there is none. A name that does not exist
        or that cannot be looked up, and a model of another family, are refused before weights are loaded.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model_kwargs |= find_model(model_name, model_kwargs)
        gpu = torch.cuda.is_available()
        if "torch_dtype" not in model_kwargs:
            model_kwargs.setdefault("dtype", torch.bfloat16 if gpu else torch.float32)
        if gpu:
            alone = processes().num_processes == 1
            model_kwargs.setdefault("device_map", "auto" if alone else {"": processes().local_process_index})
        tokenizer = load_tokenizer(AutoTokenizer, model_name, model_kwargs)
        with bars_where_watched(model_name):
            model = AutoModelForCausalLM.from_pretrained(model_name, **model_kwargs)
        return cls(model.eval(), tokenizer, config)

    # Training

    def train(
        self,
        data: Examples | Mapping[str, Examples],
        *,
        tokens_per_batch: int | None = None,
        max_memory: int | None = None,
        packed: bool | None = None,
        callbacks: Sequence[Callback] = (),
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 1,
        progress: bool = True,
        scale: float = 1.0,
        layers: Sequence[int] | None = None,
    ) -> dict[str, float]:
        """Learn S0 from zero.

        Args:
            data: pairs (text, prompt_length), the second being the number of first tokens that are the prompt, which
                is not learned; or mappings with prompt and completion, or with the messages of a conversation; or a
                file of JSON lines; see `s0kernels.tuning.data.read_examples`. A mapping from names to such data trains
                several tasks at once, each as if it were alone.
            tokens_per_batch: examples go through the model together up to this many tokens per forward, pads included;
                1 is one example a forward. The result does not depend on it but for rounding: each step's loss is the
                mean over all examples of each example's mean cross-entropy per completion token. None: the longest
                example is tried, and the largest power of two is taken that keeps to `max_memory`, and on a CPU the
                smallest that gives the model enough to do at a time. Where a forward runs out of memory all the same,
                it is done again with half, and so are those to come. The history says what was chosen, and a
                checkpoint keeps to it.
            max_memory: bytes that each process may take beyond the model, of a GPU's memory or of resident memory.
                Where one example needs more, layers are recomputed in the backward instead of being kept. None:
                nine tenths of what is free on a GPU, half of it on a CPU, shared by the processes there. With
                `tokens_per_batch` as well, that is halved until it fits.
            packed: lay the examples of a batch end to end instead of padding them. None: where the model has flash
                attention.
            callbacks: each is called after every step with the step's entry of `history`, to which it may add, and
                the states, which are attached at `scale` so that `evaluate` sees them; `save` saves them. True ends
                the training. In several processes each calls them.
            checkpoint: a file to save the run to after every `checkpoint_every` steps. Where it exists the run goes on
                from there, with the bits it would have had without the interruption (on the same number of processes);
                a longer `n_steps` prolongs a run, unless a callback has ended it.
            progress: say what is to be expected, in tokens, memory and time, and show a progress bar. Where nobody
                watches, that is a line now and then.
            scale: what the states are multiplied by while they learn. 1 learns them raw, as the `s0-tuning` package
                does, and only their use is scaled; `trainer.alpha` is Algorithm 1 of the method's paper, in which
                training sees what use will see, and a state has to grow further for the same effect.
            layers: the recurrent layers whose states learn; the others stay zero. None: all of them.

        Where states are active, the new ones take their place if they have the tasks that are active.

        Returns:
            `final_loss`, the loss of the last step before its update, and `avg_state_norm`, the mean norm of the
            state of a layer that learns. The losses of all steps are in `history`.

        Raises:
            TypeError, ValueError: no data, or an example with nothing to predict (named by its index); `checkpoint` is
                of another run; `scale` is zero; `layers` names a layer that has no state; `max_memory` is less than one
                example takes.
            torch.OutOfMemoryError: one example takes more than there is, with layers checkpointed.
            RuntimeError: a perturbed S0 leaves the logits as they are, or the loss or its gradient is not finite.
        """
        self._refuse_while_training("train")
        callbacks = checks.callbacks(callbacks)
        every = checks.positive("checkpoint_every", checkpoint_every)
        scale = checks.scale(scale)
        asked = Asked(checks.size("tokens_per_batch", tokens_per_batch), checks.size("max_memory", max_memory))
        tasks, examples = read_tasks(data, self.tokenizer, self.config.max_length)
        with torch.inference_mode(False), torch.enable_grad():
            make = self._make(packed, at_least=processes().num_processes)
            states = S0States.for_model(self.model, tasks or 1)
            learning = checks.layers(layers, states)
            for layer in states:
                states[layer].requires_grad_(layer in learning)
            run = describe_run(examples, tasks, self.config, states, scale)
            file = None if checkpoint is None else Checkpoint(checkpoint, run)
            with Frozen(self.model):
                learner = Learner(self.model, self.config, states, examples, make, scale)
                history, ended = learner.resume(file, asked)
                learner.compare(run, every, history, asked)
                with self._in_training(states, history):
                    if not history:
                        learner.check_effect()
                    if ended or len(history) == self.config.n_steps > 0:
                        final_loss = learner.show(history, progress)
                    else:
                        final_loss = learner.learn(history, asked, callbacks, file, every, progress)
        norms = torch.stack([norm.cpu() for layer, norm in states.norms().items() if layer in learning])
        return {"final_loss": final_loss, "avg_state_norm": float(norms.mean())}

    @contextlib.contextmanager
    def _in_training(self, states: S0States, history: list[dict[str, Any]]) -> Iterator[None]:
        """`states` and `history` are the trainer's from here on, unless training them fails."""
        before = self._states, self.history
        was_active, selection = self.active, self._selection
        self.deactivate()
        self._states, self.history, self._training = states, history, True
        try:
            yield
        except BaseException:
            self._states, self.history = before
            raise
        finally:
            self._training = False
            states.requires_grad_(True)
            if was_active:
                self._reactivate(selection)

    # Problems

    def collect(
        self,
        problems: Any,
        check: Checker,
        *,
        samples: int = 16,
        solutions: int = 48,
        max_new_tokens: int = 512,
        temperature: float = 0.7,
        top_p: float = 0.95,
        top_k: int = 0,
        stop: Sequence[str] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        seed: int = 42,
        rows: int | None = None,
        out: str | os.PathLike[str] | None = None,
        server: str | None = None,
        served_model: str | None = None,
        progress: bool = True,
    ) -> list[dict[str, Any]]:
        """Verified solutions, sampled from the frozen model without S0, whatever is active: what `train` takes.

        Args:
            problems: a list, a file of JSON lines or a `datasets.Dataset` of mappings with `prompt`, a text, or
                `messages`, which go through the tokenizer's template, without thinking where it can be turned off; with
                an `id`, or their place counts as that; and with what the checker needs.
            check: any callable `(problem, answer) -> bool`, as those of `s0kernels.verify`: `problem` is the mapping,
                `answer` the text of a completion, unchanged. An exception in it ends the run and names the problem. It
                is called in a thread, while the model samples.
            samples: of each problem. The first that is right is kept, so there is at most one solution a problem.
            solutions: of the problems that are solved so many are kept, the first in their order; the run stops when it
                is decided which they are.
            max_new_tokens, temperature, top_p, top_k: of sampling, as in transformers; `top_k=0`: all tokens.
            stop: texts; a completion ends before the first of them that it has.
            chat_template_kwargs: go to the template, and into the solutions, so that training uses them as well.
            seed: the noise of sampling belongs to seed, problem, sample and position. So the same seed finds the same,
                however problems are batched, interrupted or dealt out to processes, up to the model's own rounding.
            rows: sequences that go through the model at a time; None: as many as memory has room for. A batch that is
                out of memory is done again with half.
            out: a file for the solutions, as JSON lines; each is written when it is found. Beside it, with the suffix
                `.state.jsonl`, is what is decided about each problem. Started again the run goes on from there; other
                settings of sampling are refused.
            server: the URL of a server with OpenAI's API, as http://localhost:8000/v1, which samples instead of the
                trainer's model; `rows` requests at a time. What is said of the seed does not hold then.
            served_model: the model's name there; None: the only one it has.
            progress: show a bar, with the yield.

        Returns:
            `{"id", "prompt" or "messages", "completion", "ended"}` each; `ended` is whether the model ended it itself,
            and then training learns the end token.

        Raises:
            TypeError, ValueError: a problem is none, or lacks what its checker needs; `out` is of another run.
            RuntimeError: none is right, with what the model answered to the first; the checker or the server failed.
        """
        self._refuse_while_training("collect")
        wanted = checks.positive("solutions", solutions)
        sampling = Sampling(samples, max_new_tokens, temperature, top_p, top_k, stop, chat_template_kwargs, seed)
        if served_model is not None and server is None:
            raise ValueError("S0Trainer.collect: served_model is a server's, and there is no server")
        work = self._work(problems, check, sampling, rows, out, progress)
        if server is not None:
            return collect_from(server, served_model, self.tokenizer, work, wanted)
        with self._sampling_from(None), checks.closing(check):
            return collect(work, self._sampler(work), wanted)

    def _work(
        self,
        problems: Any,
        check: Checker,
        sampling: Sampling,
        rows: int | None,
        out: str | os.PathLike[str] | None,
        progress: bool,
    ) -> Work:
        if not callable(check):
            raise TypeError(f"S0Trainer: check must be a function of a problem and an answer, got {check!r}")
        rows = checks.size("rows", rows)
        found = read_problems(problems, self.tokenizer, sampling.chat_template_kwargs, check)
        about = base_model(self.model)
        model = about.get("weights") or about.get("name")
        settings = {"model": model, "prompt_format": prompt_format(found, self.tokenizer)}
        return Work(found, check, sampling, settings, rows, self.device, out, progress)

    def _sampler(self, work: Work) -> Sampler:
        options = work.sampling.chat_template_kwargs
        ends = {end_token(messages, options, "problems", self.tokenizer) for messages in chats(work.problems)[:1]}
        ends = end_tokens(self.model, self.tokenizer, sorted(ends))
        return Sampler(self.model, self.tokenizer, work.sampling, ends, self.pad_token_id)

    @overload
    def evaluate(
        self,
        data: Examples | Mapping[str, Examples],
        *,
        check: None = None,
        tokens_per_batch: int | None = None,
        packed: bool | None = None,
    ) -> float | dict[str, float]: ...

    @overload
    def evaluate(
        self,
        data: Any,
        *,
        check: Checker,
        alpha: float | None = None,
        task: str | None = None,
        samples: int = 1,
        max_new_tokens: int = 512,
        temperature: float = 0.7,
        top_p: float = 0.95,
        top_k: int = 0,
        stop: Sequence[str] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        seed: int = 42,
        rows: int | None = None,
        out: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> Evaluation: ...

    @overload
    def evaluate(
        self,
        data: Any,
        *,
        check: Checker,
        alpha: Sequence[float],
        task: str | None = None,
        samples: int = 1,
        max_new_tokens: int = 512,
        temperature: float = 0.7,
        top_p: float = 0.95,
        top_k: int = 0,
        stop: Sequence[str] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        seed: int = 42,
        rows: int | None = None,
        out: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> dict[float, Evaluation]: ...

    def evaluate(
        self,
        data: Any,
        *,
        check: Checker | None = None,
        task: str | None = None,
        alpha: float | Sequence[float] | None = None,
        tokens_per_batch: int | None = None,
        packed: bool | None = None,
        samples: int = 1,
        max_new_tokens: int = 512,
        temperature: float = 0.7,
        top_p: float = 0.95,
        top_k: int = 0,
        stop: Sequence[str] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        seed: int = 42,
        rows: int | None = None,
        out: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> Any:
        """How many problems the base solves and how many S0; without `check`, the loss of examples.

        With `check`, `data` are problems, and `samples` and what follows are as for `collect`; one sample is the
        likeliest answer, without noise. The base is the model without S0. S0 is what the trainer holds, active or not,
        `task` of several, at `alpha`, or at `trainer.alpha`; where it holds none there is the base alone. Afterwards it
        is as active as before. `alpha` may be a list, to choose from on problems that are not those of the final
        figure: the base is then done once. `out` is a file of JSON lines from which a run that was interrupted goes on.

        Without `check` it is the loss of `train` (without the L2 term) on `data`, with the states as they are active
        now. A mapping from names to data gives a loss for each; where states with names are attached, each is from its
        own. In several processes each evaluates all of it. `tokens_per_batch=None`: as many as a forward gets faster
        with. A forward that runs out of memory is done again with half.

        Returns:
            an `Evaluation` with `base`, `s0` (shares from 0 to 1), `pass_at_k`, `rows` and `answers`, of several alphas
            a dict of them by alpha; without `check` a float, or a dict of floats by name.
        """
        sampling = Sampling(
            samples, max_new_tokens, temperature, top_p, top_k, stop, chat_template_kwargs, seed, samples == 1
        )
        if check is None:
            if (sampling, rows, out, task, alpha) != (Sampling(1, greedy=True), None, None, None, None):
                raise ValueError("S0Trainer.evaluate: without check it is the loss, and nothing is sampled")
            tokens = checks.size("tokens_per_batch", tokens_per_batch) or most_tokens(self.model, self.device)
            make = self._make(packed)
            tasks, examples = read_tasks(data, self.tokenizer, self.config.max_length)
            losses = mean_losses(self.model, tasks, examples, make, tokens, self._training)
            return losses[0] if tasks is None else dict(zip(tasks, losses, strict=True))
        if tokens_per_batch is not None or packed is not None:
            raise ValueError("S0Trainer.evaluate: tokens_per_batch and packed are for the loss, without check")
        if task is not None and not isinstance(task, str):
            raise TypeError(f"S0Trainer.evaluate: task must be a name, got {task!r}")
        if task is not None or self._states is not None:
            self._select(task, "evaluate")
        states = None if self._states is None else self._usable("evaluate")
        alphas = checks.alphas(alpha, self.alpha)
        work = self._work(data, check, sampling, rows, out, progress)
        runs: dict[str, Callable] = {"base": lambda: self._sampling_from(None)}
        names = [] if states is None else [f"S0, alpha {a:g} ({digest(states, task)})" for a in alphas]
        for name, a in zip(names, alphas, strict=False):
            runs[name] = functools.partial(self._sampling_from, states, a, task)
        with checks.closing(check):
            found = evaluate(work, self._sampler(work), runs)
        base = found.pop("base")
        if not found:
            return evaluation(work.problems, samples, None, base, None)
        each = {a: evaluation(work.problems, samples, a, base, found[n]) for n, a in zip(names, alphas, strict=True)}
        return each[alphas[0]] if alpha is None or isinstance(alpha, numbers.Real) else each

    def _make(self, packed: bool | None, at_least: int = 1) -> Make:
        """What makes batches within a budget of tokens; within a smaller one where there would be fewer than
        `at_least`, a batch for every process."""
        pad, device = self.pad_token_id, self.device

        def make(examples: Sequence[Example], tokens: int) -> list[Batch]:
            while True:
                batches = make_batches(examples, tokens, packed, self.model, pad, device)
                if len(batches) >= min(at_least, len(examples)):
                    return batches
                tokens = min(tokens, sum(len(example.ids) for example in examples)) // 2

        return make
