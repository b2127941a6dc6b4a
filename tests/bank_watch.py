"""Opens banks of an attacker in a process of its own, and tells of all it did that was none of a bank's business.

    python bank_watch.py BASE MASKS PLAIN HOSTILE OUT

Two plain banks come first: what is imported late is imported then. From then on an audit hook is on.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch

from hf_cl import MaskBank
from hf_cl.errors import BankError
from hf_cl.layers.base import load_base

PATHS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
NEVER = ("import", "exec", "compile", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn",
         "socket.", "pickle.", "marshal.load", "ctypes.dlopen", "ftplib.", "http.", "urllib.")  # fmt: skip


def use(folder, base):
    """Do with a bank what can be done with it alone; return whether it was refused."""
    try:
        bank = MaskBank.from_pretrained(folder)
        model = bank.attach(base, bank.tasks[:2])
        try:
            for name in bank.tasks[:3]:
                bank.activate(model, name)
                with torch.no_grad():
                    model(input_ids=torch.ones(1, 4, dtype=torch.long))
        finally:
            model.unload()
        bank.verify()
    except BankError:
        return True
    return False


def named(plain, names):
    """Return a bank that has one task many times, under other names."""
    task = plain.manifest.tasks[0]
    data, tasks = plain._bytes(task.file), []
    blobs = {plain.manifest.shared.name: plain._bytes(plain.manifest.shared)}
    for index, name in enumerate(names):
        file = dataclasses.replace(task.file, name=f"task-{index:05d}{task.file.name[10:]}")
        tasks.append(dataclasses.replace(task, index=index, name=name, file=file))
        blobs[file.name] = data
    return MaskBank(dataclasses.replace(plain.manifest, tasks=tasks, next_index=len(tasks)), blobs=blobs)


def main(base_folder, masks, plain, hostile, out):
    base, events, watched = load_base(base_folder).model, [], [False]
    roots = [os.path.realpath(place) for place in (masks, hostile, out)]
    names = json.loads((Path(out) / "names.json").read_text())

    def inside(path):
        real = os.path.realpath(os.fsdecode(path))
        return any(real == root or real.startswith(root + os.sep) for root in roots)

    def hook(event, args):
        if not watched[0]:
            return
        count = (1 if event == "open" else 2) if event in PATHS else 0
        paths = [arg for arg in args[:count] if isinstance(arg, str | bytes | os.PathLike)]
        if event.startswith(NEVER) or not all(map(inside, paths)):
            events.append([event, repr(args)[:200]])

    sys.addaudithook(hook)
    opened = MaskBank.from_pretrained(masks)
    for bank in (opened, MaskBank.from_pretrained(plain)):
        use(bank.save_pretrained(Path(out) / f"warm {bank.digest}"), base)
    watched[0] = True
    refused = {"hostile": use(hostile, base)}
    for turn in range(0, len(names), 40):
        folder = Path(out) / str(turn)
        try:
            made = named(opened, names[turn : turn + 40]).save_pretrained(folder)
        except BankError:
            refused[str(turn)] = True
            continue
        refused[str(turn)] = use(made, base)
    watched[0] = False
    sys.stdout.write(json.dumps({"events": events, "refused": refused}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
