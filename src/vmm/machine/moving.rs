//! What a move does to the machine, by the main thread: its begin at both ends, and the chores that the phase table leaves.
//! Threads, streams and the table are `migrate`'s.
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::virtio::block::Disk;
use kvm::{DirtyLog, Host};
use memory::owed::Owed;
use memory::{Backing, marks};
use wire::machine::{FdIndex, MachineSpec};
use wire::migration::{
    DiskStream, MigrationStatus, Owner, Phase, ReceiveSpec, ReconnectSpec, SendLimits, SendSpec, Side,
};
use wire::saved::Clock;
use wire::transfer::Handed;

use super::build::Origin;
use super::chassis::Chassis;
use super::parts::Parts;
use super::save::{Files, shape, wall_ns};
use super::{Error, Machine, Run, Save, nanoseconds};
use crate::bell::Bell;
use crate::log;
use crate::migrate::{
    Effect, Event, Shared, Source, Sources, Stream, Target, open_streams, open_streams_again,
};
use crate::snapshot;

/// What may not be done yet to a machine that runs, and why.
const OWED: &str =
    "some of the machine's memory is still on its way from where it was; wait until all of it is here";

/// One move, at one of its ends.
pub(super) enum Moving {
    Source {
        source: Source,
        /// Whether the machine was paused before, and stays so if it is not given up.
        paused: bool,
    },
    Target {
        target: Target,
        /// Until the machine is built on it.
        chassis: Option<Chassis>,
        /// Whether memory was handed over, and the console's ring with it.
        handed: bool,
        /// Whether the machine stays paused.
        paused: bool,
    },
}

impl Moving {
    fn shared(&self) -> &Arc<Shared> {
        match self {
            Moving::Source { source, .. } => &source.shared,
            Moving::Target { target, .. } => &target.shared,
        }
    }

    fn stays_paused(&self) -> bool {
        match self {
            Moving::Source { paused, .. } | Moving::Target { paused, .. } => *paused,
        }
    }
}

impl Machine {
    /// Begins to move the machine over the streams of the packet.
    pub(crate) fn send(&mut self, spec: &SendSpec, descriptors: Vec<OwnedFd>) -> Result<(), Error> {
        self.check_not_moving()?;
        if self.save.as_ref().is_some_and(Save::is_under_way) {
            return Err(Error::State("the machine is being saved; wait for the end of that, or cancel it"));
        }
        if self.copies_disks() {
            return Err(Error::State("its disks are being copied; wait for the end of that, or cancel it"));
        }
        match (self.is_paused(), spec.paused) {
            (true, false) => {
                return Err(Error::State(
                    "the machine is paused; resume it first, or send it as one that is",
                ));
            }
            (false, true) => {
                return Err(Error::State("the machine runs; it cannot be sent as one that is paused"));
            }
            _ => {}
        }
        let disks = self.moved_disks(&spec.disks)?;
        let is_named = |at: usize| disks.iter().any(|(named, _)| usize::from(*named) == at);
        self.check_whole(|at| !is_named(at))?;
        self.cancel_settle();
        let mut files = Files::new(descriptors);
        let mut streams = streams(&mut files, &spec.streams)?;
        streams.iter_mut().for_each(Stream::expect_soon);
        streams.extend(disk_streams(&mut files, &spec.disks)?);
        let parts = self.parts.as_ref().ok_or(Error::Absent)?;
        let handed = if spec.handed { Some(handed(&handle(parts)?)?) } else { None };
        open_streams(&mut streams, self.plan.spec.memory_bytes, &disks, handed, spec.mode)?;
        // The one before is let go of first: two must not log the same memory.
        self.moving = None;
        let log = if spec.handed {
            None
        } else {
            marks::start(&parts.ram);
            Some(DirtyLog::start(&parts.vm)?)
        };
        disks.iter().for_each(|(_, disk)| disk.track_changes());
        let sources = Sources {
            ram: Arc::clone(&parts.ram),
            log,
            console: Arc::clone(&self.console),
            brake: parts.crew.brake(),
            disks,
        };
        let how = (spec.limits, spec.mode);
        let source = Source::start(sources, streams, spec.held, how, &self.bell)?;
        self.moving = Some(Moving::Source { source, paused: spec.paused });
        Ok(())
    }

    /// Makes everything for a machine that comes over the streams of the packet. `spec` has been checked against the number
    /// of descriptors.
    pub(crate) fn receive(
        host: &Host,
        spec: ReceiveSpec,
        descriptors: Vec<OwnedFd>,
        bell: &Arc<Bell>,
    ) -> Result<Machine, Error> {
        let mut files = Files::new(descriptors);
        let mut streams = streams(&mut files, &spec.streams)?;
        streams.extend(disk_streams(&mut files, &spec.disks)?);
        let memory = spec.memory.map(|memory| files.take("/memory", memory)).transpose()?;
        let handed = memory.as_ref().map(handed).transpose()?;
        let device = spec.userfaultfd.map(|device| files.take("/userfaultfd", device)).transpose()?;
        let backing = memory.map_or(Backing::Fresh, Backing::Adopted);
        let ram = memory::build(spec.machine.memory_bytes, backing)?;
        let mut machine = Machine::prepare(host, spec.machine, files.0, bell)?;
        let disks = machine.moved_disks(&spec.disks)?;
        // Now, while the guest runs on at the source: making its interrupt controllers waits for the whole kernel.
        let chassis = Some(Chassis::around(host, machine.plan.spec.chassis(), Arc::clone(&ram))?);
        let owed = device.map(|device| Owed::new(device.as_fd(), &ram)).transpose()?;
        let place = (&ram, &machine.console);
        let target = Target::start(place, disks, streams, spec.held, (handed, owed), bell)?;
        let (handed, paused) = (handed.is_some(), spec.paused);
        machine.moving = Some(Moving::Target { target, chassis, handed, paused });
        Ok(machine)
    }

    /// Goes on with a move whose link broke while memory was owed, over the streams of the packet.
    pub(crate) fn reconnect(&mut self, spec: &ReconnectSpec, descriptors: Vec<OwnedFd>) -> Result<(), Error> {
        let mut files = Files::new(descriptors);
        let mut streams = streams(&mut files, &spec.streams)?;
        let memory_bytes = self.plan.spec.memory_bytes;
        let Some(moving) = self.moving.as_mut().filter(|moving| moving.shared().phase() == Phase::Owing)
        else {
            return Err(Error::State("nothing of the machine's memory is owed"));
        };
        let ram = &self.parts.as_ref().ok_or(Error::Absent)?.ram;
        let count = match moving {
            Moving::Source { source, .. } => source.count(),
            Moving::Target { target, .. } => target.count(),
        };
        if streams.len() != count {
            let detail = format!("must be {count}, as there were");
            return Err(Error::Invalid { field: "/streams".to_owned(), detail });
        }
        match moving {
            Moving::Source { source, .. } => {
                open_streams_again(&mut streams, memory_bytes)?;
                Ok(source.resume(ram, streams)?)
            }
            Moving::Target { target, .. } => Ok(target.resume(ram, streams)?),
        }
    }

    /// Whether it runs, or will, with some of its memory still to come. Who waits for that cannot be stopped, and must not go on
    /// without it: a device would write something else to a disk.
    pub(crate) fn is_owed(&self) -> bool {
        let status = self.move_status();
        status.is_some_and(|status| (status.side, status.phase) == (Side::Target, Phase::Owing))
    }

    /// Memory, taps and disks, for a VMM on this host; how many taps and disks there are.
    pub(crate) fn handles(&self) -> Result<(Vec<OwnedFd>, usize, usize), Error> {
        if self.is_owed() {
            return Err(Error::State(OWED));
        }
        self.check_whole(|_| true)?;
        let MachineSpec { nics, disks, .. } = &self.plan.spec;
        let taps = nics.iter().enumerate().map(|(at, nic)| (format!("/nics/{at}/tap"), nic.tap));
        let files = disks.iter().enumerate().map(|(at, disk)| (format!("/disks/{at}/file"), disk.file));
        let mut handles = vec![handle(self.parts.as_ref().ok_or(Error::Absent)?)?.into()];
        for (field, file) in taps.chain(files) {
            handles.push(self.plan.copy(file).map_err(|cause| Error::File { field, cause })?.into());
        }
        Ok((handles, nics.len(), disks.len()))
    }

    /// Refuses disks that both ends would have open, when the other end could not know what is in which file.
    fn check_whole(&self, matters: impl Fn(usize) -> bool) -> Result<(), Error> {
        let mut drives = self.lasting.drives.iter().enumerate();
        match drives.any(|(at, disk)| matters(at) && disk.shared_bytes() > 0) {
            true => Err(Error::State(
                "some of a disk lies in the file that it was made from; settle the machine first",
            )),
            false => Ok(()),
        }
    }

    /// The disks that go along, by their positions.
    fn moved_disks(&self, named: &[DiskStream]) -> Result<Vec<(u16, Disk)>, Error> {
        let find = |(at, named): (usize, &DiskStream)| match self.lasting.drives.get(usize::from(named.disk))
        {
            Some(disk) => Ok((named.disk, disk.clone())),
            None => {
                let detail = format!("there is no disk {}", named.disk);
                Err(Error::Invalid { field: format!("/disks/{at}/disk"), detail })
            }
        };
        named.iter().enumerate().map(find).collect()
    }

    /// What the phase table has left to be done next, and how the move stands with it.
    pub(crate) fn next_chore(&self) -> Option<(Option<Effect>, MigrationStatus)> {
        self.moving.as_ref().map(|moving| moving.shared().next_chore())
    }

    /// Whether the phase table has left something to be done.
    pub(crate) fn has_chore(&self) -> bool {
        self.moving.as_ref().is_some_and(|moving| moving.shared().has_chore())
    }

    /// Does it, and tells the table.
    pub(crate) fn do_chore(&mut self, chore: Effect, host: &Host) {
        let Some(shared) = self.moving.as_ref().map(|moving| Arc::clone(moving.shared())) else { return };
        let done = match chore {
            Effect::Pause => self.stop_for_move(&shared),
            Effect::Build => self.build_moved(host, &shared),
            Effect::Run | Effect::Resume if self.moves_paused() => Ok(()),
            Effect::Run | Effect::Resume => self.go_on(),
            Effect::Drop => {
                if let Some(Moving::Target { chassis, .. }) = &mut self.moving {
                    *chassis = None;
                }
                self.stop();
                Ok(())
            }
            _ => Ok(()),
        };
        match done {
            Ok(()) if matches!(chore, Effect::Pause | Effect::Build | Effect::Run) => {
                shared.give(Event::Done);
            }
            Ok(()) => {}
            Err(error) => {
                let why = log::chain(&error);
                log::line(format_args!("a move: {why}"));
                shared.fail(Event::Failed, why);
            }
        }
    }

    /// Whether it was paused before: none of the time that passes is its guest's.
    fn moves_paused(&self) -> bool {
        self.moving.as_ref().is_some_and(Moving::stays_paused)
    }

    fn stop_for_move(&mut self, shared: &Shared) -> Result<(), Error> {
        self.park()?;
        if self.bell.has_ending() {
            return Err(Error::State("the guest came to an end as it was to be stopped"));
        }
        shared.put(self.contents()?);
        Ok(())
    }

    fn build_moved(&mut self, host: &Host, shared: &Shared) -> Result<(), Error> {
        let contents = shared.take().ok_or(Error::Absent)?;
        contents.shape.check(&shape(&self.plan.spec)).map_err(snapshot::Error::from)?;
        let Some(Moving::Target { chassis, handed, .. }) = &mut self.moving else {
            return Err(Error::Absent);
        };
        let chassis = chassis.take().ok_or(Error::Absent)?;
        if *handed {
            let caught_up = self.console.catch_up();
            caught_up.map_err(|cause| Error::File { field: "/machine/console/ring".to_owned(), cause })?;
        }
        let by_wall = wall_ns().saturating_sub(contents.machine.wall_ns);
        let (clock, stood_still) = match self.moves_paused() {
            true => (Clock::Continue, Duration::ZERO),
            false => (Clock::Advance, shared.stood_still(Duration::from_nanos(by_wall))),
        };
        let since = Instant::now();
        let clock_ns = contents.machine.clock_ns.saturating_add(nanoseconds(stood_still));
        self.lasting.before = contents.counted.stats;
        self.begin(host, Origin::Saved { chassis, state: &contents.machine, clock_ns })?;
        self.run = Run::Paused { clock_ns, since, clock };
        Ok(())
    }

    /// How the move that is under way, or the last one, stands.
    pub(crate) fn move_status(&self) -> Option<MigrationStatus> {
        self.moving.as_ref().map(|moving| moving.shared().status())
    }

    /// Gives the move up, if this end still can.
    pub(crate) fn cancel_move(&mut self) -> Result<(), Error> {
        let Some(moving) = &self.moving else { return Ok(()) };
        let shared = moving.shared();
        match shared.fail(Event::Cancel, "it was cancelled".to_owned()) {
            Some(_) => Ok(()),
            None if matches!(shared.phase(), Phase::Returned | Phase::Dropped) => Ok(()),
            None => Err(Error::State("the machine has been handed over, which cannot be taken back")),
        }
    }

    /// Gives the machine up for good, on the word of whoever holds both ends and knows that the target is ready. Repeatable.
    pub(crate) fn commit_move(&mut self) -> Result<(), Error> {
        let shared = match &self.moving {
            Some(Moving::Source { source, .. }) if source.shared.is_held => &source.shared,
            _ => return Err(Error::State("no move from here is held")),
        };
        match shared.give(Event::Commit) {
            Some(_) => Ok(()),
            None if shared.phase() == Phase::Commit => Ok(()),
            None => Err(Error::State("the machine is not ready to be given up; look how the move stands")),
        }
    }

    /// Takes the word of somebody who can see the other end.
    pub(crate) fn settle_move(&mut self, owner: Owner) -> Result<(), Error> {
        let none = Error::State("no move of this machine is in doubt");
        let status = self.move_status().ok_or(none)?;
        let agrees = match (status.side, status.phase) {
            (Side::Source, Phase::Owing | Phase::Moved) | (Side::Target, Phase::Dropped) => {
                owner == Owner::There
            }
            (Side::Source, Phase::Returned)
            | (Side::Target, Phase::Release | Phase::Owing | Phase::Moved) => owner == Owner::Here,
            _ if status.in_doubt || self.is_held_at(status.side, status.phase) => {
                let shared = self.moving.as_ref().map(|moving| Arc::clone(moving.shared()));
                return match shared.and_then(|shared| shared.give(Event::Settled(owner))) {
                    Some(_) => Ok(()),
                    None => Err(Error::State("the move has just gone on; look again")),
                };
            }
            _ => return Err(Error::State("the move is not in doubt; cancel it to end it")),
        };
        if agrees { Ok(()) } else { Err(Error::State("this end knows better which one has the machine")) }
    }

    /// Whether it waits for a word from outside, with its link whole or not.
    fn is_held_at(&self, side: Side, phase: Phase) -> bool {
        let is_held = self.moving.as_ref().is_some_and(|moving| moving.shared().is_held);
        is_held && matches!((side, phase), (Side::Source, Phase::Commit) | (Side::Target, Phase::Ready))
    }

    /// Replaces the limits of the move.
    pub(crate) fn limit_move(&mut self, limits: SendLimits) -> Result<(), Error> {
        match &self.moving {
            Some(Moving::Source { source, .. }) if !source.shared.phase().is_end() => {
                source.shared.set_limits(limits);
                Ok(())
            }
            _ => Err(Error::State("no machine is being sent from here")),
        }
    }

    /// Whether it was to come from elsewhere and will not.
    pub(crate) fn is_dropped(&self) -> bool {
        self.move_status().is_some_and(|status| status.phase == Phase::Dropped)
    }

    /// Whether the machine may be reset: not one that another end may have.
    pub(crate) fn check_resettable(&self) -> Result<(), Error> {
        match self.move_status() {
            Some(status) if status.side == Side::Source && status.phase == Phase::Rounds => Ok(()),
            _ => self.check_not_moving(),
        }
    }

    /// Lets go of a move from here that has ended, and of its log with it.
    pub(super) fn forget_sent(&mut self) {
        if matches!(self.moving, Some(Moving::Source { .. })) {
            self.moving = None;
        }
    }

    pub(super) fn check_not_moving(&self) -> Result<(), Error> {
        match self.move_status().map(|status| (status.side, status.phase)) {
            None | Some((Side::Source, Phase::Returned) | (Side::Target, Phase::Moved)) => Ok(()),
            Some((Side::Source, Phase::Owing | Phase::Moved)) => {
                Err(Error::State("the machine has moved to another VMM"))
            }
            Some((Side::Target, Phase::Owing)) => Err(Error::State(OWED)),
            Some((Side::Target, Phase::Dropped)) => {
                Err(Error::State("the machine did not come; start another VMM for another"))
            }
            Some(_) => {
                Err(Error::State("the machine is being moved; wait for the end of that, or cancel it"))
            }
        }
    }

    /// The machine is about to be another one: a move, also one that has ended, lets go of the memory of this one. How it stands is
    /// still told.
    pub(super) fn abandon_move(&mut self, why: &str) {
        match &mut self.moving {
            Some(Moving::Source { source, .. }) => {
                source.shared.fail(Event::Failed, why.to_owned());
                source.end();
            }
            Some(Moving::Target { target, .. }) => target.end(),
            None => {}
        }
    }
}

/// A descriptor of all of a machine's memory.
fn handle(parts: &Parts) -> Result<File, Error> {
    memory::handle(&parts.ram)?.ok_or(Error::State(
        "some of the machine's memory is a file's that others have; settle it first, or move it over streams",
    ))
}

fn handed(memory: &File) -> Result<Handed, Error> {
    Handed::of(memory).map_err(|cause| Error::File { field: "/memory".to_owned(), cause })
}

fn streams(files: &mut Files, named: &[FdIndex]) -> Result<Vec<Stream>, Error> {
    let take = |(at, fd): (usize, &FdIndex)| stream(files, format!("/streams/{at}"), *fd);
    named.iter().enumerate().map(take).collect()
}

fn disk_streams(files: &mut Files, named: &[DiskStream]) -> Result<Vec<Stream>, Error> {
    let take = |(at, disk): (usize, &DiskStream)| stream(files, format!("/disks/{at}/stream"), disk.stream);
    named.iter().enumerate().map(take).collect()
}

fn stream(files: &mut Files, field: String, fd: FdIndex) -> Result<Stream, Error> {
    let socket = files.take(&field, fd)?;
    Stream::new(socket.into()).map_err(|cause| Error::File { field, cause })
}
