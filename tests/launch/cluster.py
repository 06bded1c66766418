"""A real SLURM of two nodes on this machine, in a folder of its own, as the user who runs the tests."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from dist_reg.runtime import free_port

NODES = ("n0", "n1")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel")

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
KillWait=30
GresTypes=gpu
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs=8 RealMemory=1000 Gres=gpu:2
PartitionName=all Nodes={nodes} Default=YES MaxTime=60 State=UP OverSubscribe=NO
"""


@dataclass(frozen=True)
class Job:
    """What `scontrol show job` says of one job."""

    fields: dict[str, str]

    @property
    def state(self) -> str:
        return self.fields["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.fields["Restarts"])


class Cluster:
    """The daemons, and the commands that a test gives them. Use as a context manager.

    `folder` must be short (munge's socket has a path of at most 107 characters) and without spaces.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        for name in ("munge", "state", *NODES):
            (self.folder / name).mkdir(parents=True)
        for path in (self.folder, self.folder / "munge"):
            path.chmod(0o711)  # munged refuses a socket that others cannot reach
        text = CONFIGURATION.format(
            folder=self.folder,
            host=socket.gethostname().partition(".")[0],
            user=getpass.getuser(),
            controller_port=free_port(),
            nodes=",".join(NODES),
            node_ports=",".join(str(free_port()) for _ in NODES),
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text(
            "".join(
                f"NodeName={','.join(NODES)} Name=gpu File={file}\n" for file in ("/dev/null", "/dev/zero")
            )
        )
        self._start_munge()
        self._start_daemon("slurmctld", "-D")
        self._wait_for(lambda: self.call("sinfo", check=False).returncode == 0, "slurmctld")
        for node in NODES:
            self._start_daemon("slurmd", "-D", "-N", node)
        self._wait_for(lambda: self.call("sinfo", "-h", "-o", "%T").stdout.split() == ["idle"], "slurmd")

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        places = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        options = [f"--{option}={munge / name}" for option, name in places.items()]
        self._start_daemon("munged", "--foreground", "--num-threads=4", *options)
        self._wait_for((munge / "socket").exists, "munged")

    def _start_daemon(self, program: str, *arguments: str) -> None:
        log = (self.folder / f"{program}-{len(self._daemons)}.log").open("w")
        command = [daemon(program), *arguments]
        self._daemons.append(
            subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        )

    def _wait_for(self, ready, name: str) -> None:
        deadline = time.monotonic() + 30
        while not ready():
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-1500:] for path in self.folder.glob(f"{name}*.log"))
                raise RuntimeError(f"{name} did not start:\n{logs}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End the daemons and everything that they started; SLURM's own step daemons end with their tasks."""
        if len(self._daemons) == 2 + len(NODES):
            with contextlib.suppress(subprocess.TimeoutExpired):
                user = f"--user={getpass.getuser()}"
                self.call("scancel", "--signal=KILL", "--full", user, check=False, timeout=10)
                self.call("scancel", user, check=False, timeout=10)
                deadline = time.monotonic() + 15
                while (
                    self.call("squeue", "--noheader", check=False, timeout=10).stdout
                    and time.monotonic() < deadline
                ):
                    time.sleep(0.2)
        for process in reversed(self._daemons):
            process.kill()
            process.wait()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    process.kill()

    def call(
        self, *command: str, check: bool = True, timeout: float = 300, **options
    ) -> subprocess.CompletedProcess:
        """Run a SLURM command, or any other in the environment of this cluster."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, **options
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def job(self, job_id: str) -> Job:
        """What SLURM knows of a job; an ended one stays known for five minutes."""
        text = self.call("scontrol", "--oneliner", "show", "job", job_id).stdout.splitlines()[0]
        return Job(dict(word.split("=", 1) for word in text.split() if "=" in word))

    def wait(self, job_id: str, *states: str, timeout: float = 600) -> Job:
        """Wait until the job is in one of `states`, or has ended where none is given."""
        deadline = time.monotonic() + timeout
        while True:
            job = self.job(job_id)
            ended = job.state not in (
                "PENDING",
                "CONFIGURING",
                "RUNNING",
                "COMPLETING",
                "SUSPENDED",
                "REQUEUED",
            )
            if (job.state in states) if states else ended:
                return job
            if ended or time.monotonic() > deadline:
                raise AssertionError(
                    f"job {job_id} is {job.state}, not {' or '.join(states) or 'ended'}: {job.fields}"
                )
            time.sleep(0.2)

    def begin_now(self, job_id: str) -> None:
        """Let a requeued job start at once, with time enough; SLURM would hold it back for two minutes."""
        self.call("scontrol", "update", f"JobId={job_id}", "StartTime=now", "TimeLimit=10")


def daemon(program: str) -> str:
    """Path of a program; Debian keeps daemons outside an ordinary user's PATH."""
    found = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    return found or program


def missing() -> list[str]:
    """Programs of SLURM that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(daemon(name)) is None]
