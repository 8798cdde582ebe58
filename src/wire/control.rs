//! Commands to a VMM, its replies, and what it says unasked. A reply carries the number of its request;
//! notices come at any time, on every open connection.
use serde::{Deserialize, Serialize};

use crate::copies::{CopySpec, CopyStatus};
use crate::machine::{Chassis, MachineSpec, RateLimits};
use crate::migration::{MigrationStatus, Owner, ReceiveSpec, ReconnectSpec, SendLimits, SendSpec};
use crate::saved::{RestoreSpec, SaveSpec, SaveStatus};
use crate::settling::MemoryStatus;
use crate::will::Reason;

/// Version of this protocol. A VMM answers [`Command::Hello`] with its own; the daemon speaks the older.
pub const PROTOCOL: u32 = 6;

/// From which version on a [`Command::Save`] can have a base.
pub const PROTOCOL_OF_BASES: u32 = 2;

/// The first version with [`Command::Settle`], [`Command::CancelSettle`] and [`Command::MemoryStatus`].
pub const PROTOCOL_SETTLES: u32 = 3;

/// From which version on a machine can be sent that is paused.
pub const PROTOCOL_SENDS_PAUSED: u32 = 4;

/// From which version on a machine can be sent of which some memory is owed.
pub const PROTOCOL_OWES: u32 = 4;

/// The first version with [`Command::Park`].
pub const PROTOCOL_PARKS: u32 = 5;

/// From which version on a disk can be an overlay ([`crate::machine::Disk::backing`]).
pub const PROTOCOL_OVERLAYS: u32 = 6;

/// The first version with [`Command::CopyDisks`], [`Command::CancelCopy`] and [`Command::CopyStatus`].
pub const PROTOCOL_COPIES: u32 = 6;

/// One command with the number its reply will carry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Chosen by the sender, unique on its connection.
    pub id: u64,
    /// What to do.
    pub command: Command,
}

/// What a VMM can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    /// Who are you and what do you run? Answered with [`Reply::Hello`] in every state.
    Hello {
        /// The sender's [`PROTOCOL`].
        protocol: u32,
    },
    /// Show this in place of the label that the process was started with, cut to that one's length. For `ps`; nothing is
    /// derived from it.
    Label {
        /// Printable characters.
        label: String,
    },
    /// Build what of a machine can be built before it is known, for a [`Command::Boot`] that will likely follow. A machine
    /// that turns out to be another is built from nothing. Only while there is no machine; the last one counts.
    Prepare(Chassis),
    /// Build the machine and let its vCPUs run. Descriptors travel in the same packet. Once per process.
    Boot(Box<MachineSpec>),
    /// As [`Command::Boot`], but the vCPUs stay parked before their first instruction until [`Command::Resume`].
    Build(Box<MachineSpec>),
    /// Build the machine as another one was when it was saved, instead of [`Command::Boot`]. Once per process.
    Restore(Box<RestoreSpec>),
    /// Save the machine into files that travel in the same packet. Answered when the moment that is saved has passed;
    /// how the copying goes on is told by [`Notice::Save`] and [`Command::SaveStatus`]. One at a time.
    Save(SaveSpec),
    /// Give up the save that is under way. What was written is of no use. Repeatable.
    CancelSave,
    /// How the save that is under way, or the last one, stands. Answered with [`Reply::Save`].
    SaveStatus,
    /// Copy disks as they are now, into files that travel in the same packet. The machine stands still, and may run on after the
    /// answer; how the copying goes on is told by [`Command::CopyStatus`]. One at a time, and no move while it is under way.
    CopyDisks(CopySpec),
    /// Give up the copy that is under way. What was written is of no use. Repeatable.
    CancelCopy,
    /// How the copy that is under way, or the last one, stands. Answered with [`Reply::Copy`].
    CopyStatus,
    /// Have all memory be the machine's own, whatever it was mapped from, and all of its disks lie in their own files, while its
    /// guest runs. Answered when it has begun; how it goes is told by [`Command::MemoryStatus`]. Done at once where it is so already,
    /// joined where it is under way. A save, a move and a reset give it up. Refused while one of the first two is under way.
    Settle,
    /// Give up the settling that is under way. What was settled stays so. Repeatable.
    CancelSettle,
    /// Whose memory is, and the disks. Answered with [`Reply::Memory`].
    MemoryStatus,
    /// What nobody on this host can open again to take the machine over: its memory, its taps, and its disks, whose locks belong
    /// to these openings. Answered with [`Reply::Handles`]. Refused for memory and disks that are not all the machine's own:
    /// [`Command::Settle`] makes them so.
    Handles,
    /// Move the machine to another VMM over streams that travel in the same packet. Answered when it has
    /// begun; how it goes is told by [`Notice::Migration`] and [`Command::MigrationStatus`]. Until it has ended, nothing
    /// else pauses, resumes, resets or saves the machine.
    Send(SendSpec),
    /// Receive a machine, instead of [`Command::Boot`]. Once per process: one that was dropped is followed by another VMM.
    Receive(Box<ReceiveSpec>),
    /// Give up the move that is under way: the machine stays the source's. Refused by a source that has given the
    /// machine up, and by a target that has it.
    CancelMigration,
    /// How the move that is under way, or the last one, stands. Answered with [`Reply::Migration`].
    MigrationStatus,
    /// Give a machine up that is held at [`crate::migration::Phase::Ready`]: from the answer on it is taken back only by
    /// [`Command::SettleMigration`]. Refused when the source has returned. Repeatable.
    CommitMigration,
    /// Tell an end in doubt which has the machine. Who says [`Owner::Here`] knows that the other end is dead and never
    /// told [`crate::migration::Phase::Release`], or that it has dropped the machine; or, to a target, that the source
    /// has given it up. Ends that are held are told so with their link whole too. Refused by an end that knows better.
    SettleMigration {
        /// Seen from the end that is told.
        owner: Owner,
    },
    /// Go on with a move whose link broke while memory was owed, over these streams. To both ends.
    Reconnect(ReconnectSpec),
    /// Replace the limits of the move that is under way.
    LimitMigration {
        /// In force from now on.
        limits: SendLimits,
    },
    /// Stop the vCPUs and drain the devices; answered when no I/O is in flight. Repeatable.
    Pause,
    /// As [`Command::Pause`], for whoever has something to do that nobody notices: when the machine goes on, the time has passed for
    /// its guest, too. One that is paused stays as it is. Repeatable.
    Park,
    /// Let the vCPUs run again. Repeatable.
    Resume,
    /// Press the ACPI power button once.
    PressPowerButton,
    /// Build the machine again from its specification, as a reset button does.
    Reset,
    /// Write the last will and exit at once, without asking the guest.
    Quit,
    /// Counters, answered with [`Reply::Stats`].
    Stats,
    /// Send one [`Notice::Console`] as soon as the console has written more than `seen` bytes in all.
    WatchConsole {
        /// Total the sender has read.
        seen: u64,
    },
    /// Type on the console. Answered with how many bytes were taken; send the rest later.
    ConsoleInput {
        /// Standard base64 of at most [`crate::limits::CONSOLE_INPUT_BYTES_MAX`] bytes.
        data_base64: String,
    },
    /// Ask the guest to give back memory, in bytes.
    SetBalloon {
        /// Multiple of 4096 below the memory's size.
        target_bytes: u64,
    },
    /// Replace the limits of disk number `disk`.
    LimitDisk {
        /// Position in [`MachineSpec::disks`].
        disk: u16,
        /// The limits in force from now on.
        limits: RateLimits,
    },
    /// Replace the limits of interface number `nic`.
    LimitNic {
        /// Position in [`MachineSpec::nics`].
        nic: u16,
        /// To the guest.
        rx: RateLimits,
        /// From the guest.
        tx: RateLimits,
    },
}

/// Anything a VMM sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Message {
    /// The answer to request `id`.
    Reply {
        /// The request's number.
        id: u64,
        /// What came of it.
        result: Result<Reply, Fault>,
    },
    /// Something happened.
    Notice(Notice),
}

/// What a command answers when it worked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Done, nothing to tell.
    Done,
    /// Answer to [`Command::Hello`].
    Hello {
        /// The VMM's [`PROTOCOL`].
        protocol: u32,
        /// The VMM's version, for people.
        version: String,
        /// What its machine does.
        state: MachineState,
        /// Total bytes the console has written.
        console_written: u64,
        /// What it has locked itself into.
        #[serde(default)]
        sandbox: Sandbox,
    },
    /// Answer to [`Command::ConsoleInput`]: bytes taken.
    Taken {
        /// At most the length sent.
        bytes: u64,
    },
    /// Answer to [`Command::SaveStatus`].
    Save(SaveStatus),
    /// Answer to [`Command::CopyStatus`].
    Copy(CopyStatus),
    /// Answer to [`Command::MemoryStatus`].
    Memory(Box<MemoryStatus>),
    /// Answer to [`Command::MigrationStatus`]; nothing when there never was a move.
    Migration(Option<Box<MigrationStatus>>),
    /// Answer to [`Command::Handles`]: in the same packet come memory, then the tap of each interface, then each disk.
    Handles {
        /// How many interfaces there are.
        nics: u16,
        /// How many disks; absent of a VMM of an earlier build, which gives none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        disks: Option<u16>,
    },
    /// Answer to [`Command::Stats`].
    Stats(Box<MachineStats>),
}

/// The walls a VMM puts around itself and `/proc` does not show. All stand before it reads its first packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Sandbox {
    /// A system call filter lies on every thread.
    pub seccomp: bool,
    /// Version of Landlock's interface in force, which allows nothing; 0 where the kernel has none.
    pub landlock_abi: u32,
    /// Each ring of the process is restricted to reading, writing, flushing and punching the files of the one disk it has,
    /// and once there is a machine no further ring can be made.
    pub rings_restricted: bool,
}

/// Why a command did not work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{detail}")]
pub struct Fault {
    /// For programs.
    pub code: FaultCode,
    /// For people: what failed, with its causes, and what to do.
    pub detail: String,
}

/// Kinds of [`Fault`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultCode {
    /// The command or its specification is not valid.
    Invalid,
    /// Not in this state, e.g. `Pause` before `Boot`.
    WrongState,
    /// KVM or the host refused something.
    Host,
    /// The devices did not drain within the bound; the machine runs on.
    Timeout,
}

/// What the machine in a VMM does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// No machine yet: a warm shell.
    Shell,
    /// vCPUs run.
    Running,
    /// vCPUs are parked, devices drained.
    Paused,
    /// The last will is written; the process is about to end.
    Exiting,
}

/// What a VMM says unasked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Notice {
    /// The machine's vCPUs run for the first time, or again after a reset.
    Booted {
        /// 0 for the first start.
        resets: u64,
    },
    /// The console holds output beyond what [`Command::WatchConsole`] named. Sent once per watch.
    Console {
        /// Total bytes written.
        written: u64,
    },
    /// The guest broke a device's rules; the device needs a reset by its driver.
    DeviceFault {
        /// Such as `disk0` or `nic1`.
        device: String,
        /// What the guest did.
        detail: String,
    },
    /// A save has got further, or to its end.
    Save(SaveStatus),
    /// A move has got further, or to its end. A target tells [`crate::migration::Phase::Release`] before the machine runs.
    Migration(Box<MigrationStatus>),
    /// The machine is as it was saved. It runs, unless it was asked to stay paused.
    Restored,
    /// The guest's kernel crashed and said so through pvpanic.
    GuestPanicked,
    /// The machine has ended; the same is in the last will.
    Exiting(Reason),
}

/// Counters of a machine since its process started, monotonic across resets.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MachineStats {
    /// Time the vCPUs were allowed to run, in nanoseconds.
    pub running_ns: u64,
    /// Times the machine was built again.
    pub resets: u64,
    /// By vCPU.
    pub vcpus: Vec<VcpuStats>,
    /// By disk.
    pub disks: Vec<DiskStats>,
    /// By interface.
    pub nics: Vec<NicStats>,
    /// The balloon.
    pub balloon: BalloonStats,
    /// Bytes the guest read from the entropy device.
    pub rng_bytes: u64,
    /// Buffers for entropy that lay outside guest memory.
    #[serde(default)]
    pub rng_malformed: u64,
    /// Total bytes the console has written.
    pub console_written: u64,
    /// Guest accesses to addresses and ports where nothing is.
    pub unclaimed_accesses: u64,
}

/// Counters of one vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VcpuStats {
    /// Exits to user space.
    pub exits: u64,
    /// CPU time of the thread, in nanoseconds.
    pub cpu_ns: u64,
}

/// Counters of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DiskStats {
    /// Completed reads.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Completed writes.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Completed flushes.
    pub flushes: u64,
    /// Completed discards and write-zeroes.
    pub discards: u64,
    /// Requests answered with an error of the host's storage.
    pub errors: u64,
    /// Requests that broke the protocol.
    pub malformed: u64,
    /// Times a request waited for the limits.
    pub throttled: u64,
}

/// Counters of one interface, as the guest sees directions.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NicStats {
    /// Packets to the guest.
    pub rx_packets: u64,
    /// Bytes to the guest.
    pub rx_bytes: u64,
    /// Packets from the guest.
    pub tx_packets: u64,
    /// Bytes from the guest.
    pub tx_bytes: u64,
    /// Packets for the guest dropped because they did not fit its buffers.
    pub rx_dropped: u64,
    /// Packets from the guest that the tap did not take.
    pub tx_dropped: u64,
    /// Chains that broke the protocol.
    pub malformed: u64,
    /// Times a direction waited for its limits.
    pub throttled: u64,
}

/// The balloon's size and traffic.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BalloonStats {
    /// Bytes asked for.
    pub target_bytes: u64,
    /// Bytes the guest has given.
    pub actual_bytes: u64,
    /// Bytes returned to the host by free page reporting, in all.
    pub reported_bytes: u64,
    /// Requests that broke the protocol.
    pub malformed: u64,
}
