"""Fuzzes threads and forks: `python fuzz/threads.py [seconds] [seed]`.

Round by round, a process makes aligners, calls them from a random number of threads, and forks while they are at it;
the forks call from threads, fork, and start pools themselves. Every answer is compared with the one of a single thread.
A round that hangs is killed, and its stacks are printed; the exit status is then 1.
"""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

import together  # noqa: E402

#: Seconds of calls in one round.
ROUND = 8


def play(rng, al, until, depth, counts):
    """Calls and forks at random until it is time."""
    while time.monotonic() < until:
        match rng.randrange(6):
            case 0 if depth < 4:
                seed, fresh = rng.random(), rng.randrange(4) == 0
                share = min(until, time.monotonic() + 1.5)

                def work(seed=seed, fresh=fresh, share=share):
                    own = random.Random(seed)
                    one = together.aligner() if fresh else al
                    with together.Hammer(one, own.randrange(3), seed=own.randrange(1 << 30)) as hammer:
                        play(own, one, share, depth + 1, Counter())
                    assert not hammer.failures, hammer.failures

                pids = [together.forked(work) for _ in range(rng.choice((1, 1, 3)))]
                together.check(al, [rng.choice(list(together.CALLS))])
                together.joined(pids)
                counts["forks"] += len(pids)
            case 1:
                threads = rng.choice((1, 2, 3, 7, 33, 4096))
                assert together.align_batch(al, threads) == together.answers()["align_batch"]
                counts["other pools"] += 1
            case 2:
                # Worked out for the first time by several threads, and by a fork in between.
                one = together.aligner()
                workers = [threading.Thread(target=together.check, args=(one, ["cover_queries"])) for _ in range(2)]
                for worker in workers:
                    worker.start()
                time.sleep(rng.random() * 0.02)
                together.joined([together.forked(lambda one=one: together.check(one))])
                for worker in workers:
                    worker.join()
                counts["first uses"] += 1
            case _:
                name = rng.choice(list(together.CALLS))
                together.check(al, [name])
                counts[name] += 1


def one_round(seed):
    rng, counts = random.Random(seed), Counter()
    al = together.aligner()
    with together.Hammer(al, rng.choice((0, 1, 2, 4, 8)), seed=seed) as hammer:
        play(rng, al, time.monotonic() + ROUND, 0, counts)
    assert not hammer.failures, hammer.failures
    print(json.dumps(counts + hammer.counts))


def main():
    seconds, seed = (float(sys.argv[1]) if len(sys.argv) > 1 else 60.0), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    until, counts, findings, rounds = time.monotonic() + seconds, Counter(), 0, 0
    while time.monotonic() < until:
        rounds += 1
        environment = {**os.environ, "RAYON_NUM_THREADS": str(random.Random(seed).choice((1, 2, 4)))}
        command = [sys.executable, __file__, "round", str(seed)]
        limit = ROUND + 2 * together.HANGS
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment, check=False)
            if done.returncode or "Traceback" in done.stderr:
                raise RuntimeError(f"ended with {done.returncode}\n{done.stderr}")
            counts.update(json.loads(done.stdout))
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            findings += 1
            print(f"seed {seed}: {error}", file=sys.stderr)
        seed += 1
    print(f"{rounds} rounds: {', '.join(f'{n} {name}' for name, n in sorted(counts.items()))}; {findings} findings")
    sys.exit(findings > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["round"]:
        import faulthandler
        import signal

        faulthandler.register(signal.SIGALRM, chain=True)
        signal.alarm(ROUND + together.HANGS)
        one_round(int(sys.argv[2]))
    else:
        main()
