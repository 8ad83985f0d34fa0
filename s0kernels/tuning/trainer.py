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
    """Train the initial states of a model, and use them. The API is that of the `s0-tuning` package.

    Args:
        model: a causal language model of transformers, from a supported family. Its mixers are swapped in place.
        tokenizer: its tokenizer.
        config: the settings of training; the defaults are those of the paper.

    The base weights get no gradient and do not change. In several processes (`accelerate launch`, `torchrun`), each
    process trains on a share of the batches, and all end with the same states.
    """

    @classmethod
    def from_pretrained(cls, model_name: str, config: S0Config | None = None, **model_kwargs: Any) -> "S0Trainer":
        """Load model and tokenizer through transformers' Auto classes.

        `model_kwargs` are passed to `AutoModelForCausalLM.from_pretrained`. By default the model is loaded in bf16 with
        `device_map="auto"` if there is a GPU, and in fp32 on the CPU otherwise. A model that cannot be found, and a
        model of an unsupported family, are refused before weights are loaded.
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
            data: pairs (text, prompt_length), where the first `prompt_length` tokens are the prompt, which is not
                learned; or mappings with prompt and completion, or with the messages of a conversation; or a file of
                JSON lines. See `s0kernels.tuning.data.read_examples`. A mapping from names to such data trains several
                tasks at once, each as if it were alone.
            tokens_per_batch: maximum number of tokens in one forward, pads included; 1 means one example per forward.
                Apart from rounding, the result does not depend on it: the loss of a step is the mean over all examples
                of the mean cross-entropy of an example's completion tokens. None: the longest example is measured, and
                the largest power of two that keeps to `max_memory` is chosen; on a CPU, the smallest one that gives the
                model enough work at a time. If a forward runs out of memory all the same, it is repeated with half as
                many tokens, and so are later forwards. The history records the choice, and a checkpoint keeps it.
            max_memory: number of bytes that each process may use beyond the model, of GPU memory or of resident memory.
                If one example needs more, layers are recomputed in the backward instead of being kept. None: nine
                tenths of the free memory on a GPU, half of it on a CPU, shared by the processes there. If
                `tokens_per_batch` is given too, it is halved until it fits.
            packed: lay the examples of a batch end to end instead of padding them. None does so if the model has flash
                attention.
            callbacks: functions called after every step with the step's entry of `history`, to which they may add, and
                the states. The states are attached at `scale`, so `evaluate` uses them, and `save` saves them. A
                callback that returns True ends the training. Every process calls them.
            checkpoint: file that the run is saved to after every `checkpoint_every` steps. If it exists, the run
                resumes from it, and the result has the same bits as without the interruption (on the same number of
                processes). A larger `n_steps` continues a finished run, unless a callback has ended it.
            progress: print the expected tokens, memory and time, and show a progress bar, or lines in a log.
            scale: factor that multiplies the states during training. 1 is the choice of the `s0-tuning` package: only
                their use is scaled. `trainer.alpha` is Algorithm 1 of the paper: training and use see the same states,
                and a state has to grow further for the same effect.
            layers: indices of the recurrent layers whose states are trained; the others stay zero. None: all of them.

        If states were active, the new ones become active instead, provided that they have the active tasks.

        Returns:
            `final_loss`, the loss of the last step before its update, and `avg_state_norm`, the mean norm of the
            state of a layer that learns. The losses of all steps are in `history`.

        Raises:
            TypeError, ValueError: there is no data, or an example has nothing to predict (the message has its index);
                `checkpoint` belongs to another run; `scale` is zero; `layers` names a layer without a state;
                `max_memory` is less than one example needs.
            torch.OutOfMemoryError: one example needs more memory than is free, even with layers checkpointed.
            RuntimeError: a random S0 does not change the logits, or the loss or its gradient is not finite.
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
        """Make `states` and `history` those of the trainer. If training fails, restore the previous ones."""
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
        """Sample solutions from the frozen model, verify them, and return them as examples for `train`. The model
        samples without S0, even if states are active.

        Args:
            problems: a list, a file of JSON lines or a `datasets.Dataset` of mappings. A mapping has a `prompt` (text)
                or `messages`, which go through the tokenizer's chat template, with thinking turned off if the template
                can. It may have an `id`; the default is its index. It also has the keys that the checker needs.
            check: a callable `(problem, answer) -> bool`, such as those of `s0kernels.verify`. `problem` is the
                mapping, `answer` the unchanged text of a completion. An exception in it ends the run, and the error
                names the problem. It is called in a thread while the model samples.
            samples: number of samples of each problem. The first correct one is kept, so a problem has at most one
                solution.
            solutions: number of solutions to keep: those of the first solved problems, in the order of `problems`. The
                run stops as soon as these are known.
            max_new_tokens, temperature, top_p, top_k: settings of sampling, as in transformers. `top_k=0` allows all
                tokens.
            stop: list of texts. A completion ends before the first of them that occurs in it.
            chat_template_kwargs: arguments of the chat template. They are stored in the solutions, so that training
                uses them as well.
            seed: the random number of a token depends on seed, problem, sample and position alone. So the same seed
                gives the same samples, however the problems are batched, interrupted or divided among processes, up to
                the model's own rounding.
            rows: number of sequences in a batch; None: as many as fit into memory. A batch that runs out of memory is
                repeated in halves.
            out: file for the solutions, as JSON lines; each is written as soon as it is found. A file beside it, with
                the suffix `.state.jsonl`, records the result of each problem. A second run resumes from there; it is
                refused if its settings of sampling differ.
            server: URL of a server with OpenAI's API, such as http://localhost:8000/v1, which samples instead of the
                trainer's model, with `rows` requests at a time. Then the same seed does not guarantee the same samples.
            served_model: name of the model on the server; None: the only model that the server has.
            progress: show a progress bar with the share of problems solved.

        Returns:
            A list of `{"id", "prompt" or "messages", "completion", "ended"}`. `ended` says whether the model ended the
            completion itself; if so, training learns the end token.

        Raises:
            TypeError, ValueError: a problem is invalid, or lacks a key that its checker needs; `out` belongs to another
                run.
            RuntimeError: no sample is correct (the message shows some answers); the checker or the server failed.
        """
        self._refuse_while_training("collect")
        wanted = checks.positive("solutions", solutions)
        sampling = Sampling(samples, max_new_tokens, temperature, top_p, top_k, stop, chat_template_kwargs, seed)
        if served_model is not None and server is None:
            raise ValueError("S0Trainer.collect: served_model needs server, which is None")
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
        """Compare how many problems the model solves with and without S0. Without `check`, compute the loss of
        examples.

        With `check`, `data` are problems, and `samples` and the arguments after it are those of `collect`. With
        `samples=1` the answer is greedy: the most likely token each time. The base is the model without S0. The states
        are those of the trainer, active or not, at `alpha` (default: `trainer.alpha`); `task` chooses one of several
        tasks. A trainer without states evaluates the base alone. `alpha` may be a list, in order to choose among
        several on problems other than those of the final figure; the base is then evaluated once. `out` is a file of
        JSON lines from which an interrupted run resumes. The call does not change which states are active.

        Without `check`, the result is the loss of `train` (without the L2 term) on `data`, with the states that are
        active now. A mapping from names to data gives a loss for each; if states with names are attached, each name
        uses its own task. Every process evaluates all the data. `tokens_per_batch=None`: as many tokens as make a
        forward faster per token. A forward that runs out of memory is repeated in halves.

        Returns:
            An `Evaluation` with `base`, `s0` (shares from 0 to 1), `pass_at_k`, `rows` and `answers`; for several
            alphas, a dict of them by alpha. Without `check`, a float, or a dict of floats by name.
        """
        sampling = Sampling(
            samples, max_new_tokens, temperature, top_p, top_k, stop, chat_template_kwargs, seed, samples == 1
        )
        if check is None:
            if (sampling, rows, out, task, alpha) != (Sampling(1, greedy=True), None, None, None, None):
                raise ValueError(
                    "S0Trainer.evaluate: the arguments of sampling need check; without check the result is the loss"
                )
            tokens = checks.size("tokens_per_batch", tokens_per_batch) or most_tokens(self.model, self.device)
            make = self._make(packed)
            tasks, examples = read_tasks(data, self.tokenizer, self.config.max_length)
            losses = mean_losses(self.model, tasks, examples, make, tokens, self._training)
            return losses[0] if tasks is None else dict(zip(tasks, losses, strict=True))
        if tokens_per_batch is not None or packed is not None:
            raise ValueError(
                "S0Trainer.evaluate: tokens_per_batch and packed must not be given with check; they belong to the loss"
            )
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
        """Return a function that makes batches within a budget of tokens. It lowers the budget if there would be fewer
        than `at_least` batches, so that every process gets one."""
        pad, device = self.pad_token_id, self.device

        def make(examples: Sequence[Example], tokens: int) -> list[Batch]:
            while True:
                batches = make_batches(examples, tokens, packed, self.model, pad, device)
                if len(batches) >= min(at_least, len(examples)):
                    return batches
                tokens = min(tokens, sum(len(example.ids) for example in examples)) // 2

        return make
