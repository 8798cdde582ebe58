//! The part of a fake VMM in a move, held by its daemons or handed over on one host: the same phases as the real one's, a few bytes for memory, and the
//! disks as they are. A guest is a number that goes with its machine, and nobody may be seen to run one twice.
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use wire::control::{Fault, FaultCode, MachineState, Notice, Reply};
use wire::migration::{MigrationStatus, Owner, Phase, Progress, ReceiveSpec, SendSpec, Side};

use super::{FakeVmm, Order, lock};

/// What the ends of a handover say to each other.
const RELEASED: u8 = 1;
const READY: u8 = 2;
const COMMIT: u8 = 3;

/// Bytes of memory that go over each stream.
const MEMORY_BYTES: usize = 3000;

/// Where each guest runs, over all hosts of a test, by the number of its VMM.
static GUESTS: Mutex<BTreeMap<u64, i32>> = Mutex::new(BTreeMap::new());

static NEXT: AtomicU64 = AtomicU64::new(1);

/// A guest that begins.
pub(super) fn new_guest() -> u64 {
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A VMM lets a guest run. Answers which other one does too.
pub(super) fn runs(guest: u64, pid: i32) -> Option<i32> {
    lock(&GUESTS).insert(guest, pid).filter(|other| *other != pid)
}

/// A VMM does not run a guest any more.
pub(super) fn stands(guest: u64, pid: i32) {
    let mut guests = lock(&GUESTS);
    if guests.get(&guest) == Some(&pid) {
        guests.remove(&guest);
    }
}

fn refuse(detail: &str) -> Result<Reply, Fault> {
    Err(Fault { code: FaultCode::WrongState, detail: detail.to_owned() })
}

fn status(side: Side) -> MigrationStatus {
    let progress = Progress::default();
    MigrationStatus {
        side,
        phase: Phase::Rounds,
        in_doubt: false,
        owes: false,
        link_lost: false,
        progress,
        detail: None,
    }
}

/// Descriptors of the packet as streams, and those of disks with the disk's position.
fn streams(named: impl Iterator<Item = u16>, descriptors: &[OwnedFd]) -> std::io::Result<Vec<UnixStream>> {
    named.map(|at| Ok(UnixStream::from(descriptors[usize::from(at)].try_clone()?))).collect()
}

impl FakeVmm {
    pub(super) fn send(
        self: &Arc<FakeVmm>,
        spec: &SendSpec,
        descriptors: &[OwnedFd],
        disks: Vec<File>,
    ) -> Result<Reply, Fault> {
        let here = if spec.paused { MachineState::Paused } else { MachineState::Running };
        if self.state() != here {
            return refuse("the machine is not as it was said to be");
        }
        let named = spec.streams.iter().map(|fd| fd.0).chain(spec.disks.iter().map(|disk| disk.stream.0));
        let Ok(streams) = streams(named, descriptors) else { return refuse("no streams") };
        {
            let mut inside = lock(&self.inside);
            inside.moving = Some(status(Side::Source));
            inside.moves_paused = spec.paused;
            inside.handed = inside.disk.filter(|_| spec.handed);
        }
        let copies = streams.iter().map(|stream| stream.try_clone()).collect::<Result<_, _>>();
        lock(&self.inside).streams = copies.unwrap_or_default();
        let (vmm, of_memory, is_held) = (self.clone(), spec.streams.len(), spec.held);
        std::thread::spawn(move || {
            let sent = vmm.send_all(&streams, of_memory, &disks);
            if !is_held {
                return vmm.gives(&streams[0], sent);
            }
            // Whatever comes back first: that it runs there, or that nobody is there.
            let mut word = [0];
            let has_run = sent.and_then(|()| (&streams[0]).read_exact(&mut word)).is_ok();
            vmm.hears_back(has_run);
        });
        Ok(Reply::Done)
    }

    fn send_all(&self, streams: &[UnixStream], of_memory: usize, disks: &[File]) -> std::io::Result<()> {
        let (memory, of_disks) = streams.split_at(of_memory);
        for mut stream in memory {
            stream.write_all(&[7; MEMORY_BYTES])?;
        }
        {
            let mut inside = lock(&self.inside);
            if inside.moving.as_ref().is_none_or(|status| status.phase != Phase::Rounds) {
                return Err(std::io::ErrorKind::BrokenPipe.into());
            }
            self.turn(&mut inside, MachineState::Paused);
        }
        for (mut stream, disk) in of_disks.iter().zip(disks) {
            let mut bytes = vec![0; usize::try_from(disk.metadata()?.len()).unwrap_or_default()];
            disk.read_exact_at(&mut bytes, 0)?;
            stream.write_all(&(bytes.len() as u64).to_le_bytes())?;
            stream.write_all(&bytes)?;
        }
        let guest = lock(&self.inside).life;
        (&memory[0]).write_all(&guest.to_le_bytes())?;
        self.goes_to(Phase::Ready)
    }

    /// A source that hears the target's words itself.
    fn gives(&self, mut stream: &UnixStream, sent: std::io::Result<()>) {
        let mut word = [0];
        let given = sent.and_then(|()| stream.read_exact(&mut word)).and_then(|()| match word {
            [READY] => {
                self.goes_to(Phase::Commit)?;
                lock(&self.inside).disk = None;
                // Nobody hears it of a target that has died.
                let _ = stream.write_all(&[COMMIT]);
                stream.read_exact(&mut word)
            }
            _ => Err(std::io::ErrorKind::BrokenPipe.into()),
        });
        match given {
            Ok(()) if word == [RELEASED] => drop(self.goes_to(Phase::Moved)),
            Ok(()) => self.returns(),
            Err(_) => {
                let is_given = |status: &&mut MigrationStatus| status.phase == Phase::Commit;
                let mut inside = lock(&self.inside);
                if let Some(status) = inside.moving.as_mut().filter(is_given) {
                    status.in_doubt = true;
                    return self.tell(inside);
                }
                drop(inside);
                self.returns();
            }
        }
    }

    /// Whoever has the machine now lets it run, unless it is one that is paused.
    fn goes_on(&self, inside: &mut super::Inside) {
        if !inside.moves_paused {
            self.turn(inside, MachineState::Running);
        }
    }

    fn returns(&self) {
        if self.goes_to(Phase::Returned).is_ok() {
            let mut inside = lock(&self.inside);
            if inside.state.is_some() {
                inside.disk = inside.handed.take().or(inside.disk);
            }
            self.goes_on(&mut inside);
        }
    }

    /// A target that hears the source's.
    fn takes(&self, mut stream: &UnixStream) {
        let mut word = [0];
        let heard = self.goes_to(Phase::Ready).and_then(|()| {
            let _ = stream.write_all(&[READY]);
            stream.read_exact(&mut word)
        });
        let mut inside = lock(&self.inside);
        match heard {
            Ok(()) if word == [COMMIT] => {
                drop(inside);
                let _ = self.releases(stream);
            }
            _ => {
                let is_ready = |status: &&mut MigrationStatus| status.phase == Phase::Ready;
                if let Some(status) = inside.moving.as_mut().filter(is_ready) {
                    status.in_doubt = true;
                    self.tell(inside);
                }
            }
        }
    }

    fn releases(&self, mut stream: &UnixStream) -> std::io::Result<()> {
        self.goes_to(Phase::Release)?;
        {
            let mut inside = lock(&self.inside);
            if inside.state.is_some() {
                inside.disk = inside.handed.take();
            }
            self.goes_on(&mut inside);
        }
        self.goes_to(Phase::Moved)?;
        let _ = stream.write_all(&[RELEASED]);
        Ok(())
    }

    /// Enters a phase and tells of it, unless it is over or this is where it dies.
    fn goes_to(&self, phase: Phase) -> std::io::Result<()> {
        let mut inside = lock(&self.inside);
        let death = inside.death;
        let status = inside.moving.as_mut().filter(|status| !status.phase.is_end());
        let Some(status) = status else { return Err(std::io::ErrorKind::BrokenPipe.into()) };
        let side = status.side;
        if death == Some((side, phase, false)) {
            drop(inside);
            return Err(self.dies());
        }
        status.phase = phase;
        self.tell(inside);
        if death == Some((side, phase, true)) {
            return Err(self.dies());
        }
        Ok(())
    }

    fn dies(&self) -> std::io::Error {
        self.kill();
        while lock(&self.inside).state.is_some() {
            std::thread::yield_now();
        }
        std::io::ErrorKind::BrokenPipe.into()
    }

    fn tell(&self, inside: std::sync::MutexGuard<'_, super::Inside>) {
        drop(inside);
        self.tell_move();
    }

    fn hears_back(&self, has_run: bool) {
        let mut inside = lock(&self.inside);
        let Some(status) = inside.moving.as_mut() else { return };
        match (status.phase, has_run) {
            (Phase::Commit, true) => status.phase = Phase::Moved,
            (Phase::Commit, false) => status.in_doubt = true,
            (phase, _) if phase.is_end() => return,
            _ => {
                status.phase = Phase::Returned;
                status.detail = Some("a stream is gone".to_owned());
                self.goes_on(&mut inside);
            }
        }
        drop(inside);
        self.tell_move();
    }

    pub(super) fn receive(
        self: &Arc<FakeVmm>,
        spec: &ReceiveSpec,
        descriptors: &[OwnedFd],
    ) -> Result<Reply, Fault> {
        let named = spec.streams.iter().map(|fd| fd.0).chain(spec.disks.iter().map(|disk| disk.stream.0));
        let Ok(streams) = streams(named, descriptors) else { return refuse("no streams") };
        let disk = |disk: &wire::migration::DiskStream| {
            let file = spec.machine.disks[usize::from(disk.disk)].file;
            descriptors[usize::from(file.0)].try_clone().map(File::from)
        };
        let Ok(disks) = spec.disks.iter().map(disk).collect::<Result<Vec<File>, _>>() else {
            return refuse("no disks");
        };
        let copies = streams.iter().map(|stream| stream.try_clone()).collect::<Result<_, _>>();
        {
            let mut inside = lock(&self.inside);
            inside.moving = Some(status(Side::Target));
            inside.moves_paused = spec.paused;
            inside.streams = copies.unwrap_or_default();
            inside.spec = Some(spec.machine.clone());
        }
        let (vmm, of_memory, is_held) = (self.clone(), spec.streams.len(), spec.held);
        std::thread::spawn(move || {
            let guest = receive_all(&streams, of_memory, &disks);
            let mut inside = lock(&vmm.inside);
            let Some(status) = inside.moving.as_mut().filter(|status| status.phase == Phase::Rounds) else {
                return;
            };
            match guest {
                Ok(guest) => {
                    inside.life = guest;
                    vmm.turn(&mut inside, MachineState::Paused);
                    drop(inside);
                    if !is_held {
                        return vmm.takes(&streams[0]);
                    }
                    let _ = vmm.goes_to(Phase::Ready);
                    return;
                }
                Err(cause) => {
                    status.phase = Phase::Dropped;
                    status.detail = Some(cause.to_string());
                }
            }
            drop(inside);
            vmm.tell_move();
        });
        Ok(Reply::Done)
    }

    pub(super) fn commit_move(&self) -> Result<Reply, Fault> {
        let mut inside = lock(&self.inside);
        match inside.moving.as_mut() {
            Some(status) if status.side == Side::Source => match status.phase {
                Phase::Ready | Phase::Commit => status.phase = Phase::Commit,
                _ => return refuse("not ready to be given up"),
            },
            _ => return refuse("no move from here is held"),
        }
        Ok(Reply::Done)
    }

    pub(super) fn cancel_move(&self) -> Result<Reply, Fault> {
        let mut inside = lock(&self.inside);
        let Some(status) = inside.moving.as_mut() else { return Ok(Reply::Done) };
        match (status.side, status.phase) {
            (Side::Source, Phase::Commit | Phase::Moved) | (Side::Target, Phase::Release | Phase::Moved) => {
                return refuse("the machine has been handed over");
            }
            (Side::Source, Phase::Returned) => return Ok(Reply::Done),
            (Side::Target, _) => status.phase = Phase::Dropped,
            (Side::Source, _) => {
                status.phase = Phase::Returned;
                self.goes_on(&mut inside);
            }
        }
        shut(&inside.streams);
        Ok(Reply::Done)
    }

    pub(super) fn settle_move(&self, owner: Owner) -> Result<Reply, Fault> {
        let mut inside = lock(&self.inside);
        let Some(status) = inside.moving.as_mut() else { return refuse("no move is in doubt") };
        match (status.side, status.phase, owner) {
            (Side::Source, Phase::Commit, Owner::Here) => {
                status.phase = Phase::Returned;
                inside.disk = inside.handed.take().or(inside.disk);
                self.goes_on(&mut inside);
            }
            (Side::Source, Phase::Commit, Owner::There) => status.phase = Phase::Moved,
            (Side::Target, Phase::Ready, Owner::Here) => {
                status.phase = Phase::Moved;
                inside.disk = inside.handed.take().or(inside.disk);
                self.goes_on(&mut inside);
                let _ = inside.streams.first().map(|mut stream| stream.write_all(&[1]));
            }
            (Side::Target, Phase::Ready, Owner::There) => status.phase = Phase::Dropped,
            (Side::Source, Phase::Moved, Owner::There)
            | (Side::Target, Phase::Dropped, Owner::There)
            | (Side::Source, Phase::Returned, Owner::Here)
            | (Side::Target, Phase::Moved, Owner::Here) => {}
            _ => return refuse("this end knows better"),
        }
        Ok(Reply::Done)
    }

    /// The target's VMM has said that the machine runs there, whatever becomes of the daemons' connections.
    pub fn hears_that_it_runs_there(&self) {
        if let Some(status) = lock(&self.inside).moving.as_mut() {
            status.phase = Phase::Moved;
        }
    }

    /// A machine that has come cannot be let run.
    pub(super) fn drop_arrival(&self) -> Result<Reply, Fault> {
        if let Some(status) = lock(&self.inside).moving.as_mut() {
            (status.phase, status.detail) = (Phase::Dropped, Some("KVM has no room for it".to_owned()));
        }
        self.tell_move();
        Ok(Reply::Done)
    }

    /// Ends its streams, as the kernel does with those of a process that ends.
    pub(super) fn shut_streams(&self) {
        shut(&lock(&self.inside).streams);
    }

    fn tell_move(&self) {
        let status = lock(&self.inside).moving.clone();
        if let Some(status) = status {
            self.order(Order::Notice(Notice::Migration(Box::new(status))));
        }
    }
}

fn shut(streams: &[UnixStream]) {
    for stream in streams {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

/// Answers which guest came.
fn receive_all(streams: &[UnixStream], of_memory: usize, disks: &[File]) -> std::io::Result<u64> {
    let (memory, of_disks) = streams.split_at(of_memory);
    for mut stream in memory {
        stream.read_exact(&mut [0; MEMORY_BYTES])?;
    }
    for (mut stream, disk) in of_disks.iter().zip(disks) {
        let mut length = [0; 8];
        stream.read_exact(&mut length)?;
        let mut bytes = vec![0; usize::try_from(u64::from_le_bytes(length)).unwrap_or_default()];
        stream.read_exact(&mut bytes)?;
        disk.write_all_at(&bytes, 0)?;
    }
    let mut guest = [0; 8];
    (&memory[0]).read_exact(&mut guest)?;
    Ok(u64::from_le_bytes(guest))
}
