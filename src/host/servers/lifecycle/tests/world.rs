//! What there is besides the records, and what the pieces of work do to it.
use model::VolumeId;
use model::volume::FillMethod;

use super::*;

/// What its disk is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Disk {
    /// Not there, or what a loss of power has left of it.
    #[default]
    Unfit,
    /// Whole, if not lost with the host's power.
    Whole,
    /// Whole for good.
    Flushed,
}

/// What there is besides the records.
#[derive(Debug, Default)]
pub(super) struct World {
    pub(super) disk: Disk,
    /// Whether a guest may have written to it.
    pub(super) is_written: bool,
    pub(super) machine: Option<(ProcessId, MachineState)>,
    /// A second VMM.
    pub(super) other: Option<ProcessId>,
    /// Whether it is parked before its first instruction.
    pub(super) is_unbegun: bool,
    pub(super) spawned: i32,
    pub(super) made: u32,
    pub(super) resets: u64,
    pub(super) now_ms: i64,
    /// The memory on the disk, and whether it is still that of the disks.
    pub(super) saved: Option<Saved>,
    pub(super) is_stale: bool,
    pub(super) turns: u8,
    /// The snapshot from whose memory the machine went on.
    pub(super) shares: Option<SnapshotId>,
    /// Whether its disk is an overlay.
    pub(super) is_over: bool,
    /// The snapshot whose files lie beside the disks.
    pub(super) copied: Option<SnapshotId>,
    /// The snapshot whose files took the places of the disks last.
    pub(super) taken_back: Option<SnapshotId>,
    /// Snapshots whose files are complete.
    pub(super) snapshots: BTreeSet<SnapshotId>,
}

impl World {
    pub(super) fn context(&self) -> Context {
        Context { now_ms: self.now_ms, policy: RestartPolicy::Always }
    }

    pub(super) fn end(&self) -> End {
        End::of(Some(Will { reason: Reason::Asked, at_unix_ms: 0 }), None, 0, self.now_ms)
    }

    /// Does a piece of work as the effects do.
    pub(super) fn perform(&mut self, life: &Life) -> Event {
        match life.work().expect("work to do") {
            // The VMM of one server in two is started while its disk is made.
            Work::Make if life.phase == (Phase::Creating { start: true }) => {
                self.made += 1;
                self.fill(life);
                let vmm = self.made.is_multiple_of(2).then(|| self.spawn(life));
                if vmm.is_none() {
                    self.dismiss_shell();
                    self.disk = Disk::Flushed;
                }
                let restores = vmm.is_some() && life.saved.is_some();
                if restores {
                    self.restore(life.saved);
                }
                Event::Made { volumes: self.filled(life), vmm, restores }
            }
            Work::Make => {
                self.dismiss_shell();
                self.fill(life);
                self.disk = Disk::Flushed;
                Event::Made { volumes: self.filled(life), vmm: None, restores: false }
            }
            Work::Spawn => {
                assert!(
                    self.disk == Disk::Flushed && life.unflushed.is_empty(),
                    "{life:?} on {:?}",
                    self.disk
                );
                Event::Spawned(self.spawn(life))
            }
            Work::Await => {
                // What comes is whole before it can run.
                self.disk = Disk::Flushed;
                Event::Spawned(self.spawn(life))
            }
            Work::Snapshot { id } => {
                self.snapshots.insert(id);
                let taken = Taken {
                    at_ms: self.now_ms,
                    paused_ms: 0,
                    delayed: None,
                    disks: Vec::new(),
                    root: None,
                    stored_bytes: 1,
                    chain: Default::default(),
                    full_because: None,
                };
                match &life.phase {
                    // A machine that ran runs on, whatever an earlier try has left.
                    Phase::Snapshotting { back: Back::Running, .. } => {
                        self.turn(MachineState::Running, Event::SnapshotTaken(id, taken))
                    }
                    _ => Event::SnapshotTaken(id, taken),
                }
            }
            Work::Boot { .. } | Work::Resume | Work::Pause | Work::Save if self.machine.is_none() => {
                Event::Ended(self.end())
            }
            Work::Boot { saved: None } => {
                self.flush();
                self.is_stale = true;
                self.turn(MachineState::Running, Event::Booted)
            }
            Work::Boot { saved } => {
                assert!(saved.is_some() && saved == self.saved, "restored from what is not there");
                assert!(!self.is_stale, "restored a memory that the disks have left behind");
                self.restore(saved)
            }
            Work::Save => {
                self.turns += 1;
                let saved =
                    Saved { root: Digest([self.turns; 32]), stored_bytes: 1, of: SavedOf::Hibernation };
                (self.saved, self.is_stale) = (Some(saved), false);
                self.turn(MachineState::Paused, Event::Saved(saved))
            }
            Work::Pause => self.turn(MachineState::Paused, Event::Paused),
            Work::Resume => {
                self.flush();
                (self.saved, self.is_stale) = (None, true);
                self.turn(MachineState::Running, Event::Resumed)
            }
            Work::Settle { job } => {
                if self.machine.is_none() {
                    return Event::Ended(self.end());
                }
                Event::Settled(job)
            }
            Work::SpawnNext => {
                self.spawned += 1;
                let vmm = ProcessId { pid: self.spawned, start_ticks: 0, boot_id: String::new() };
                // One that was never recorded is dismissed first.
                self.other = Some(vmm.clone());
                Event::Spawned(Spawned { vmm, sandbox: None, cage: None, build: None })
            }
            Work::HandOver => {
                let Phase::Upgrading { vmm, next: Some(next), .. } = &life.phase else { panic!("{life:?}") };
                let Some((held, _)) = &mut self.machine else { return Event::Ended(self.end()) };
                let is_given = *held == next.vmm;
                if !is_given && next.vmm.pid % 3 == 0 {
                    let detail = "it was refused".to_owned();
                    return Event::HandOverFailed(Trouble { code: Code::MachineFailed, detail });
                }
                assert!(is_given || *held == *vmm && self.other == Some(next.vmm.clone()));
                (*held, self.other) = (next.vmm.clone(), Some(vmm.clone()));
                Event::HandedOver
            }
            Work::Retire => {
                let Phase::Retiring { vmm, other, .. } = &life.phase else { panic!("{life:?}") };
                let machine = self.machine.as_ref().map(|(held, _)| held);
                assert!(machine == Some(vmm) && self.other.as_ref().is_none_or(|left| left == other));
                self.other = None;
                Event::Retired
            }
            Work::CountResets => Event::ResetsCounted(self.resets),
            Work::Reset { resets } => {
                self.resets += u64::from(self.resets == resets);
                self.shares = None;
                Event::WasReset
            }
            Work::Press => {
                // A parked one is let run for it.
                self.flush();
                self.turn(MachineState::Running, Event::Pressed)
            }
            Work::Kill => {
                self.machine = None;
                Event::Ended(self.end())
            }
            Work::CopyBack { to, job } => {
                self.copied = Some(to.snapshot);
                Event::CopiedBack(job)
            }
            Work::TakeBack { to } => {
                assert!(self.machine.is_none(), "disks were taken from under a machine");
                let is_again = self.taken_back == Some(to.snapshot);
                assert!(
                    self.copied.take() == Some(to.snapshot) || is_again,
                    "what takes their place is gone"
                );
                self.taken_back = Some(to.snapshot);
                self.is_over = false;
                let (root, of) = (Digest([0; 32]), SavedOf::Snapshot { id: to.snapshot });
                self.saved = to.memory.then_some(Saved { root, stored_bytes: 1, of });
                self.is_stale = false;
                Event::TakenBack(to.snapshot, self.saved)
            }
            Work::Release { keep_saved, keep_copied, flush } => {
                assert!(self.machine.is_none(), "released under a machine");
                if flush {
                    assert!(!life.unflushed.is_empty());
                    self.fill(life);
                    self.disk = Disk::Flushed;
                }
                if !keep_saved {
                    self.saved = None;
                }
                if !keep_copied {
                    self.copied = None;
                }
                Event::Released { flushed: flush, kept: keep_saved || keep_copied }
            }
            Work::Purge => {
                self.dismiss_shell();
                assert!(self.machine.is_none(), "purged under a machine");
                self.saved = None;
                Event::Purged
            }
        }
    }

    /// A VMM that was started while the disk was made, by a daemon that died before it was recorded.
    pub(super) fn dismiss_shell(&mut self) {
        let has_not_run = self.is_unbegun || !self.is_written;
        self.machine.take_if(|(_, state)| *state == MachineState::Shell || has_not_run);
    }

    /// One machine in two that begins with its kernel is built before its process is recorded.
    pub(super) fn spawn(&mut self, life: &Life) -> Spawned {
        self.spawned += 1;
        let id = ProcessId { pid: self.spawned, start_ticks: 0, boot_id: String::new() };
        // A process that was never recorded is dismissed first.
        self.dismiss_shell();
        assert!(!matches!(self.machine, Some((_, MachineState::Running | MachineState::Paused))));
        self.shares = None;
        let comes = matches!(life.phase, Phase::Arriving { .. });
        self.is_unbegun = !comes && life.saved.is_none() && self.spawned % 2 == 0;
        let state = if self.is_unbegun { MachineState::Paused } else { MachineState::Shell };
        self.machine = Some((id.clone(), state));
        Spawned { vmm: id, sandbox: None, cage: None, build: None }
    }

    /// How its disk was filled: that of a clone needs what it was made from.
    fn filled(&mut self, life: &Life) -> Vec<Filled> {
        self.is_over = life.saved.is_some_and(|saved| matches!(saved.of, SavedOf::Clone { .. }));
        let method = if self.is_over { FillMethod::Overlay } else { FillMethod::SparseCopy };
        vec![Filled { id: VolumeId(uuid::Uuid::from_u128(7)), method }]
    }

    /// What is there is kept where the life knows of it.
    pub(super) fn fill(&mut self, life: &Life) {
        if self.disk == Disk::Unfit || life.unflushed.is_empty() {
            assert!(!self.is_written, "what the guest has written is gone");
            self.disk = Disk::Whole;
        }
    }

    /// A machine comes to run.
    pub(super) fn flush(&mut self) {
        assert_ne!(self.disk, Disk::Unfit, "a machine runs on a disk that is gone");
        (self.disk, self.is_written) = (Disk::Flushed, true);
    }

    pub(super) fn turn(&mut self, state: MachineState, event: Event) -> Event {
        self.is_unbegun = false;
        if let Some((_, held)) = &mut self.machine {
            *held = state;
        }
        event
    }

    pub(super) fn restore(&mut self, saved: Option<Saved>) -> Event {
        self.shares = saved.and_then(|saved| saved.of.snapshot());
        self.turn(MachineState::Paused, Event::Restored)
    }

    /// What a starting daemon finds.
    pub(super) fn look(&self, life: &Life) -> Option<Event> {
        let vmm = life.phase.vmm()?;
        Some(Event::Found(match &self.machine {
            Some((id, state)) if id == vmm => Found::Alive(*state),
            _ => Found::Gone(self.end()),
        }))
    }
}
