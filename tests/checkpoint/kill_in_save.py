"""Kills processes that save checkpoints at random moments and resumes after each.

A process of its own: it forks, which no process may do that has run torch on several threads.
"""

import os
import random
import signal
import sys
from pathlib import Path

import torch

from sasa_det.checkpoint import Checkpointer

# Bytes of a checkpoint, about.
SIZE = 600_000
# Looks at a process, which take as long as a few saves, after which it is killed wherever it is.
MOST_LOOKS = 500


def checkpointer(folder, iteration):
    model = torch.nn.Linear(SIZE // 4, 1)
    torch.nn.init.constant_(model.weight, float(iteration))
    return Checkpointer(model, str(folder))


def save_for_ever(folder, name, iteration, saved):
    while True:
        iteration += 1
        run = checkpointer(folder, iteration)
        run.save(name.format(iteration), iteration=iteration)
        run.remove_old("model_", 1)
        os.write(saved, b".")


def kill_within(folder, name, iteration, draw):
    """Let a child save, kill it in one of its saves, and return how many it finished."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        save_for_ever(folder, name, iteration, writer)
    os.close(writer)
    num_saved = len(os.read(reader, 1))
    size = draw.randrange(SIZE)
    for _ in range(draw.randrange(MOST_LOOKS)):
        if largest_part(folder) >= size:
            break
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    while read := os.read(reader, 1000):
        num_saved += len(read)
    os.close(reader)
    return num_saved


def largest_part(folder):
    try:
        return max((part.stat().st_size for part in folder.glob(".writing.pth")), default=0)
    except FileNotFoundError:  # it was renamed meanwhile
        return 0


def main(folder, name, num_kills):
    draw = random.Random(0)
    iteration, num_abandoned = 0, 0
    for _ in range(num_kills):
        # Finished before the kill, so that a resumed run must not be behind it.
        finished = iteration + kill_within(folder, name, iteration, draw)
        num_abandoned += any(folder.glob(".writing.pth"))
        run = checkpointer(folder, -1)
        iteration = run.resume_or_load("", resume=True)["iteration"]
        assert finished <= iteration <= finished + 1, (finished, iteration)
        assert (run.model.weight == iteration).all()
    run.save(name.format(iteration + 1), iteration=iteration + 1)
    run.remove_old("model_", 1)
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["last_checkpoint", f"{name.format(iteration + 1)}.pth"], left
    print(num_abandoned)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Under the same name, which is the only one, and under another each time.
    main(Path(sys.argv[1], "one"), "model_final", int(sys.argv[2]))
    main(Path(sys.argv[1], "many"), "model_{:07d}", int(sys.argv[2]))
