"""The kinds of input that `fuzz.py` makes: what is sound, how it is changed, and the code that is given it.

Models are tiny (tests/tiny.py), so that an input takes milliseconds; what is fuzzed is the reading, not the computing.
"""

from __future__ import annotations

import copy
import functools
import gzip
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import datasets
import datasets.config
import fuzz_mutate as mutate
import report_run
import torch
import yaml
from gguf_checkpoint import checkpoint
from tiny import tiny
from transformers.utils import chat_template_utils

from recover.base import products
from recover.commands import run as reports
from recover.config import recipe
from recover.config.recipe import GivenText, Lora, Model, TeacherText, load_recipe
from recover.export.gguf.write import write_gguf
from recover.measure.tasks import load_task
from recover.models.gguf_folder import check_head
from recover.models.load import describe, load_model, load_tokenizer
from recover.models.plan import MaskRecord, Plan, load_plan, save_plan
from recover.models.source import check_weights, locate
from recover.models.tokenizers import check_template
from recover.models.twin import Twin
from recover.prune.calibrate import read_texts
from recover.run.directory import RunDirectory
from recover.text.prompts import encode_prompt
from recover.train import teacher_file
from recover.train.checkpoints import read_adapter, write_adapter
from recover.train.sources import check_given, read_prompts

ROOT = Path(__file__).parent.parent
YAML_PIECES = (
    *(
        "!!python/object/apply:os.system ['touch pwned']",
        "&a [*a, *a]",
        "*nothing",
        "<<: {a: 1}",
        "? [a]",
        "\t",
        "- - - -",
    ),
    *(
        "!!binary aGk=",
        "!!set {a}",
        "1:2:3",
        "0o777",
        "1_000",
        "2024-01-01",
        "|\n  x",
        "{a: {a: {a: ",
        "%TAG ! x",
        "---\n",
    ),
    *("\x00", "\ufeff", "\u2028", "'", '"', "# x\n", "kind: ", "null\n", "[" * 300, "{a: " * 300, "name: name: "),
    "a: &a [x,x,x,x]\nb: &b [*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b]\nd: [*c,*c,*c,*c]\n",
)
TEMPLATE_PIECES = (
    *(
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{% set x = 'a' * 99999 %}{{ x }}",
        "{{ [0] * 10**9 }}",
    ),
    *(
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
    ),
    *(
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ x.y.z }}",
    ),
    *(
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('no') }}",
        "{{ messages[99].content }}",
        "{%",
    ),
    *(
        "{{ lipsum.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ '%s%s'|format(1) }}",
        "{{ 1 / 0 }}",
        "}}",
    ),
    *(
        "{{ messages|map(attribute='__class__')|list }}",
        "{% if not add_generation_prompt %}{{ 2 ** 99999 }}{% endif %}",
    ),
    *(
        "{{ messages[0]['content'] | replace('', 'a' * 99) }}",
        "{{ namespace.__init__ }}",
        "{% generation %}",
        "{{ strftime_now('%s') }}",
    ),
    *(
        "{%- break %}",
        "{{ (messages|tojson) * 9999 }}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    ),
    *(
        "{{ messages[0]['content'].format(messages) }}",
        "{{ ''['__class__'] }}",
        "{{ 10 ** 10 ** 10 }}",
        "\x1b[2J",
        "\ud800",
    ),
)
TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n{% endif %}\n"
    "{% for m in messages %}\n<|{{ m['role'] }}|>{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}\n"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROWS = (
    {
        "prompt": "Olga carries 81 roses.",
        "completion": " She gives 3 away.",
        "text": "Olga carries 81 roses.",
        "target": "78",
    },
    {
        "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Olga."}],
        "options": ["a", "b"],
    },
    {
        "question": {"a": ["x", 1]},
        "answer": 1,
        "text": "naïve 東京 🙂",
        "query": "roses",
        "documents": ["a", "b"],
        "relevant": [0],
    },
)


class Kind:
    """A kind of input in a folder: `make` puts the next one there, `work` reads it."""

    def __init__(self, folder: Path) -> None:
        datasets.config.HF_DATASETS_CACHE = datasets.config.DOWNLOADED_DATASETS_PATH = folder.parent / "tmp"
        self.folder = folder
        self.prepare()

    def prepare(self) -> None:
        """What is sound, once."""

    def make(self, chance: random.Random) -> None:
        """The next input."""
        raise NotImplementedError

    def work(self, chance: random.Random) -> None:
        """Read it, as the program does."""
        raise NotImplementedError

    def after(self) -> None:
        """Forget what is kept of the last inputs alone."""

    def put(self, name: str, data: bytes | str) -> Path:
        """A file of the input."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
        return path


class Recipes(Kind):
    """Recipes and overrides."""

    def prepare(self) -> None:
        self.sound = [path.read_text() for path in sorted((ROOT / "recipes").glob("*.yaml"))]
        self.trees = [yaml.safe_load(text) for text in self.sound]

    def make(self, chance: random.Random) -> None:
        which = chance.randrange(len(self.sound))
        if chance.random() < 0.6:
            data = yaml.safe_dump(mutate.tree(self.trees[which], chance), allow_unicode=True)
        elif chance.random() < 0.8:
            data = mutate.text(self.sound[which], YAML_PIECES, chance)
        else:
            data = mutate.raw(self.sound[which].encode(), chance)
        self.put("recipe.yaml", data)
        keys = (
            "prune.count",
            "train.data.0.share",
            "train.data.9",
            "a.b",
            "",
            "model",
            "prune",
            "..",
            "train.lr",
        )
        self.overrides = []
        if chance.random() < 0.3:
            self.overrides = [f"{chance.choice(keys)}={chance.choice((*YAML_PIECES, *map(str, mutate.VALUES)))}"]

    def work(self, chance: random.Random) -> None:
        load_recipe(self.folder / "recipe.yaml", self.overrides)


class Tasks(Kind):
    """Task files, each with its rows."""

    def prepare(self) -> None:
        os.mkfifo(self.folder / "pipe.jsonl")
        self.trees = [
            {
                "name": "g",
                "kind": "generate",
                "data": "rows.jsonl",
                "prompt": "{prompt}",
                "target": "target",
                "answer": r"-?\d+",
            },
            {
                "name": "c",
                "kind": "choice",
                "data": "rows.jsonl",
                "prompt": "{text}",
                "options": "options",
                "target": "answer",
            },
            {"name": "p", "kind": "perplexity", "data": "rows.jsonl", "text": "{text}"},
            {"name": "r", "kind": "retrieval", "data": "rows.jsonl", "query": "query", "documents": "documents"},
            {
                "name": "h",
                "kind": "code",
                "data": "rows.jsonl",
                "prompt": "{prompt}",
                "program": "{completion}",
                "stop": ["\n"],
            },
            {
                **{
                    "name": "f",
                    "kind": "generate",
                    "data": "rows.jsonl",
                    "prompt": "{question[a]}",
                    "target": "target",
                },
                "fewshot": {"count": 1, "separator": "\n"},
            },
        ]
        for path in sorted((ROOT / "recover" / "embedded" / "tasks").glob("*.yaml")):
            self.trees.append({**yaml.safe_load(path.read_text()), "data": "rows.jsonl"})
        self.rows = [
            {**ROWS[0], **ROWS[1], **ROWS[2], "prompt": f"Olga carries {number} roses."} for number in range(3)
        ]

    def make(self, chance: random.Random) -> None:
        tree = chance.choice(self.trees)
        rows = self.rows
        way = chance.random()
        if way < 0.7:
            tree = mutate.tree(tree, chance)
        if way > 0.5:
            rows = mutate.tree(rows, chance)
        data = yaml.safe_dump(tree, allow_unicode=True)
        if chance.random() < 0.15:
            data = mutate.text(data, YAML_PIECES, chance)
        self.put("task.yaml", data)
        lines = b"\n".join(mutate.as_json(row, chance) for row in (rows if isinstance(rows, list) else [rows]))
        self.put("rows.jsonl", mutate.raw(lines, chance) if chance.random() < 0.1 else lines)

    def work(self, chance: random.Random) -> None:
        load_task(str(self.folder / "task.yaml"))


class DataRows(Kind):
    """Files of rows, of every ending, as prompts, given text and calibration text."""

    ENDINGS = ("jsonl", "jsonl", "json", "csv", "tsv", "txt", "jsonl.gz", "parquet", "arrow", "saved")

    def prepare(self) -> None:
        import pyarrow
        from pyarrow import ipc, parquet

        self.tokenizer = load_tokenizer(Model(source=recipe.embedded("fable-2m").as_posix()))
        self.tokenizer.chat_template = TEMPLATE
        table = pyarrow.table({"prompt": ["a", "b"], "completion": ["c", None], "text": ["d", "e"], "n": [[1], [2]]})
        parquet.write_table(table, self.folder / "sound.parquet")
        with ipc.new_file(str(self.folder / "sound.arrow"), table.schema) as file:
            file.write_table(table)
        datasets.Dataset(table).save_to_disk(self.folder / "sound")
        self.saved = {path.name: path.read_bytes() for path in (self.folder / "sound").iterdir()}
        self.tables = {name: (self.folder / f"sound.{name}").read_bytes() for name in ("parquet", "arrow")}
        self.sheet = 'prompt,completion,text\n"a, ""b""",c,d\n1,,"two\nlines"\n'

    def make(self, chance: random.Random) -> None:
        self.ending = chance.choice(self.ENDINGS)
        if self.ending == "saved":
            name = chance.choice(sorted(self.saved))
            for each, data in self.saved.items():
                self.path = self.put(f"saved/{each}", data if each != name else self.damaged(data, chance)).parent
            return
        if self.ending in self.tables:
            data = mutate.raw(self.tables[self.ending], chance)
        elif self.ending in ("csv", "tsv", "txt"):
            sheet = self.sheet.replace(",", "\t") if self.ending == "tsv" else self.sheet
            data = mutate.text(
                sheet, ('"', ",", "\x00", "\r", "\ufeff", "a" * 9000, "\t", "\ud800", "\n\n"), chance
            ).encode("utf-8", "surrogatepass")
        else:
            rows = [mutate.tree(row, chance) if chance.random() < 0.6 else row for row in ROWS]
            whole = self.ending == "json" and chance.random() < 0.5
            data = mutate.as_json(rows, chance) if whole else b"\n".join(mutate.as_json(row, chance) for row in rows)
        if self.ending == "jsonl.gz":
            data = mutate.raw(gzip.compress(data, 1), chance) if chance.random() < 0.5 else gzip.compress(data, 1)
        for old in self.folder.glob("rows.*"):
            old.unlink()
        self.path = self.put(f"rows.{self.ending}", data)

    def damaged(self, data: bytes, chance: random.Random) -> bytes:
        """A file that `save_to_disk` wrote: a table, or settings."""
        return (
            mutate.as_json(mutate.tree(json.loads(data), chance), chance)
            if data[:1] == b"{"
            else mutate.raw(data, chance)
        )

    def work(self, chance: random.Random) -> None:
        use = chance.randrange(4)
        if use == 0:
            prompts = read_prompts(str(self.path), column=chance.choice((None, None, "text")))
            for row in prompts[:4]:
                encode_prompt(self.tokenizer, row.value["prompt"])
        elif use == 1:
            read_texts(recipe.Calibration(data=str(self.path), samples=2, length=16))
        else:
            columns: Any = chance.choice(
                ({"text": "text"}, {"messages": "messages"}, {"prompt": "prompt", "completion": "completion"})
            )
            check_given(GivenText(kind="given", source=str(self.path), columns=columns), self.tokenizer, 64)


class ModelFolder(Kind):
    """What is sound of a tiny model, in self.folder / 'model'."""

    changed = ("config.json",)

    def prepare(self) -> None:
        checkpoint(self.folder / "model", num_hidden_layers=1)
        self.model = self.folder / "model"
        (self.model / "chat_template.jinja").write_text(TEMPLATE)
        self.cfg = Model(source=str(self.model))
        self.sound = {name: (self.model / name).read_bytes() for name in self.changed}

    def restore(self) -> None:
        """As it was."""
        for name, data in self.sound.items():
            (self.model / name).write_bytes(data)


class Configs(ModelFolder):
    """config.json."""

    def make(self, chance: random.Random) -> None:
        value = json.loads(self.sound["config.json"])
        for key in (
            "rope_scaling",
            "attn_implementation",
            "quantization_config",
            "sliding_window",
            "layer_types",
            "id2label",
        ):
            if chance.random() < 0.1:
                value[key] = chance.choice(mutate.VALUES)
        self.put("model/config.json", mutate.as_json(mutate.tree(value, chance), chance))

    def work(self, chance: random.Random) -> None:
        describe(self.cfg)
        if chance.random() < 0.2:
            load_model(self.cfg)


class Settings(ModelFolder):
    """generation_config.json, tokenizer_config.json, special_tokens_map.json and tokenizer.json."""

    changed = ("generation_config.json", "tokenizer_config.json", "tokenizer.json")

    def make(self, chance: random.Random) -> None:
        self.restore()
        self.name = chance.choice(self.changed)
        value = json.loads(self.sound[self.name])
        if self.name == "tokenizer.json" and chance.random() < 0.7:  # its vocabulary is most of it
            part = chance.choice([key for key in value if key != "model"])
            value[part] = mutate.tree([value[part]], chance)
            value[part] = value[part][0] if isinstance(value[part], list) and value[part] else None
        else:
            value = mutate.tree(value, chance)
        self.put(f"model/{self.name}", mutate.as_json(value, chance))

    def work(self, chance: random.Random) -> None:
        if self.name == "generation_config.json":
            load_model(self.cfg)
            return
        tokenizer = load_tokenizer(self.cfg)
        for prompt in ("Olga carries 81 roses.", "naïve 東京 🙂 <|endoftext|>\n\n"):
            tokenizer.decode(encode_prompt(tokenizer, prompt))


class Templates(ModelFolder):
    """Chat templates."""

    changed = ("chat_template.jinja",)

    def prepare(self) -> None:
        super().prepare()
        self.tokenizer = load_tokenizer(self.cfg)

    def make(self, chance: random.Random) -> None:
        self.template = mutate.text(TEMPLATE, TEMPLATE_PIECES, chance)
        self.put("model/chat_template.jinja", self.template)

    def work(self, chance: random.Random) -> None:
        if chance.random() < 0.05:
            load_tokenizer(self.cfg)
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.chat_template = self.template
        check_template(tokenizer, self.model)
        encode_prompt(tokenizer, "Olga carries 81 roses.")
        encode_prompt(tokenizer, [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])

    def after(self) -> None:
        for kept in ("_compile_jinja_template", "_get_template_variables", "_get_template_literal_text"):
            if (function := getattr(chat_template_utils, kept, None)) is not None:
                function.cache_clear()  # of the last 128 templates, of which a model has one


class GgufHeads(Kind):
    """The heads of GGUF files."""

    first: int | None = None

    def prepare(self) -> None:
        model = checkpoint(self.folder / "model", num_hidden_layers=1)
        self.content = write_gguf(model, self.folder / "sound.gguf").read_bytes()
        shutil.rmtree(self.folder / "model")
        self.size = len(self.content)

    def make(self, chance: random.Random) -> None:
        self.put("model.gguf", mutate.raw(self.content, chance, chance.choice((32, 128, 512, 3000, 40_000))))

    def work(self, chance: random.Random) -> None:
        check_head(self.folder / "model.gguf", self.folder / "model.gguf")


class GgufFiles(GgufHeads):
    """GGUF files, converted."""

    def work(self, chance: random.Random) -> None:
        shutil.rmtree(os.environ["RECOVER_CACHE"], ignore_errors=True)
        cfg = Model(source=str(self.folder / "model.gguf"))
        locate(cfg)
        load_model(cfg)
        load_tokenizer(cfg)


class Heads(ModelFolder):
    """The heads of safetensors files, and lists of several files."""

    changed = ("model.safetensors",)

    def prepare(self) -> None:
        super().prepare()
        tiny("llama").save_pretrained(self.folder / "parts", max_shard_size="100KB")
        self.parts = {path.name: path.read_bytes() for path in (self.folder / "parts").iterdir()}
        self.index = json.loads(self.parts["model.safetensors.index.json"])

    def make(self, chance: random.Random) -> None:
        if chance.random() < 0.3:
            for name, data in self.parts.items():
                self.put(f"parts/{name}", data)
            self.put("parts/model.safetensors.index.json", mutate.as_json(mutate.tree(self.index, chance), chance))
            self.there = self.folder / "parts"
            return
        self.there = self.model
        data = self.sound["model.safetensors"]
        size = int.from_bytes(data[:8], "little")
        if chance.random() < 0.5:
            head = mutate.as_json(mutate.tree(json.loads(data[8 : 8 + size]), chance), chance)
            data = len(head).to_bytes(8, "little") + head + data[8 + size :]
        else:
            data = mutate.raw(data, chance, chance.choice((8, 64, size + 8)))
        self.put("model/model.safetensors", data)

    def work(self, chance: random.Random) -> None:
        check_weights(self.there)
        if chance.random() < 0.2:
            load_model(Model(source=str(self.there)))


class Adapters(Kind):
    """Adapters, and the masks and weights of a plan."""

    def prepare(self) -> None:
        twin = Twin(tiny("llama"), Plan.none(tiny("llama").config.num_hidden_layers))
        self.model = twin.add_lora(Lora(rank=2))
        write_adapter(self.model, self.folder / "adapter")
        name = "model.layers.0.mlp.up_proj"
        keep_OI = torch.rand(8, 16) > 0.5
        plan = Plan(
            "wanda", 2, masks={name: MaskRecord.of(keep_OI, "unstructured")}, weights={f"{name}.weight": (8, 16)}
        )
        save_plan(plan, {name: keep_OI}, self.folder / "prune", {f"{name}.weight": torch.rand(8, 16)})
        self.sound = {
            path.relative_to(self.folder).as_posix(): path.read_bytes()
            for path in self.folder.rglob("*")
            if path.is_file()
        }

    def make(self, chance: random.Random) -> None:
        for name, data in self.sound.items():
            self.put(name, data)
        self.name = chance.choice(list(self.sound))
        data = self.sound[self.name]
        if self.name.endswith(".json"):
            self.put(self.name, mutate.as_json(mutate.tree(json.loads(data), chance), chance))
            return
        size = int.from_bytes(data[:8], "little")
        if chance.random() < 0.5:
            head = mutate.as_json(mutate.tree(json.loads(data[8 : 8 + size]), chance), chance)
            self.put(self.name, len(head).to_bytes(8, "little") + head + data[8 + size :])
        else:
            self.put(self.name, mutate.raw(data, chance, chance.choice((8, 64, size + 8, None))))

    def work(self, chance: random.Random) -> None:
        if self.name.startswith("adapter"):
            read_adapter(self.model, self.folder / "adapter")
        else:
            load_plan(self.folder / "prune")


class TeacherFiles(Kind):
    """Files of a teacher's likeliest tokens."""

    def prepare(self) -> None:
        self.tokenizer = load_tokenizer(Model(source=recipe.embedded("fable-2m").as_posix()))
        teacher_file.marks = functools.cache(teacher_file.marks)  # of this one tokenizer: nine tenths of the time

    ROW: ClassVar = {"input_ids": [1, 5, 9, 7], "completion_mask": [0, 1, 0, 1], "top_ids": [[5, 4], [7, 3]]}

    def make(self, chance: random.Random) -> None:
        row = {**self.ROW, "top_logprobs": [[-0.1, -3.0], [-0.5, -1.5]]}
        rows = [mutate.tree(row, chance) if chance.random() < 0.7 else row for _ in range(3)]
        lines = b"\n".join(mutate.as_json(each, chance) for each in rows)
        self.path = self.put("teacher.jsonl", lines)

    def work(self, chance: random.Random) -> None:
        teacher_file.check_teacher(TeacherText(kind="teacher", source=str(self.path)), 64, self.tokenizer)


class Runs(Kind):
    """The files of a finished run, as the commands that show, report and compare it read them."""

    def prepare(self) -> None:
        before = report_run.BLOCKS, report_run.DROPPED, report_run.STEPS
        report_run.BLOCKS, report_run.DROPPED, report_run.STEPS = 4, (1,), 6  # a page is drawn for each input
        try:
            self.run, self.other = (report_run.build_run(self.folder, name=name) for name in ("run", "other"))
        finally:
            report_run.BLOCKS, report_run.DROPPED, report_run.STEPS = before
        for stage in ("plan", "dense", "prune", "before", "train", "after", "export", "report"):
            RunDirectory(self.run).mark_done(stage, {"seed": 0, "model": {"source": "x"}})
        self.sound = {
            path.relative_to(self.run).as_posix(): path.read_bytes() for path in self.run.rglob("*") if path.is_file()
        }
        self.changed: list[str] = []

    def make(self, chance: random.Random) -> None:
        for name in ("report.json", "report.md", "report.html", *self.changed):
            (self.run / name).unlink(missing_ok=True)
        for name in {*self.changed, "report.json", "report.md", "report.html"} & self.sound.keys():
            self.put(f"{self.run.name}/{name}", self.sound[name])
        self.changed = chance.sample(list(self.sound), chance.choice((1, 1, 2)))
        for name in self.changed:
            self.put(f"{self.run.name}/{name}", self.damaged(name, chance))

    def damaged(self, name: str, chance: random.Random) -> bytes:
        """The file, changed as what it is."""
        data = self.sound[name]
        if name.endswith(".yaml"):
            return yaml.safe_dump(mutate.tree(yaml.safe_load(data), chance), allow_unicode=True).encode(
                "utf-8", "replace"
            )
        if name.endswith(".jsonl"):
            lines = data.splitlines()
            at = chance.randrange(len(lines))
            lines[at] = mutate.as_json(mutate.tree(json.loads(lines[at]), chance), chance)
            return b"\n".join(lines) + b"\n"
        if name.endswith(".json"):
            return mutate.as_json(mutate.tree(json.loads(data), chance), chance)
        return mutate.raw(data, chance)

    def work(self, chance: random.Random) -> None:
        use: Callable[[], None] = chance.choice(
            (
                lambda: reports.show(self.run),
                lambda: reports.report([self.run], None),
                lambda: reports.compare([self.run, self.other], None),
            )
        )
        use()

    def after(self) -> None:
        products._digests.clear()


KINDS: dict[str, type[Kind]] = {
    "recipe": Recipes,
    "task": Tasks,
    "rows": DataRows,
    "config": Configs,
    "settings": Settings,
    "template": Templates,
    "gguf-head": GgufHeads,
    "gguf": GgufFiles,
    "safetensors": Heads,
    "adapter": Adapters,
    "teacher": TeacherFiles,
    "run": Runs,
}
