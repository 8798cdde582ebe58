//! How a machine ended, from its last will, its exit status and what the host knows. Pure.
use model::Time;
use model::server::StateReason;
use serde::{Deserialize, Serialize};
use wire::launch::ExitStatus;
use wire::will::{Reason, Will};

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// For programs.
    pub kind: EndKind,
    /// For people.
    pub detail: String,
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: i64,
}

/// Kinds of ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndKind {
    /// The guest powered itself off.
    GuestPoweredOff,
    /// The guest asked for a reset that its machine did not do by itself.
    GuestReset,
    /// A vCPU triple-faulted.
    TripleFault,
    /// The guest's kernel crashed.
    GuestPanicked,
    /// The daemon told the VMM to quit.
    Asked,
    /// KVM could not go on.
    KvmError,
    /// The VMM has a bug.
    VmmCrashed,
    /// The VMM was killed by a signal.
    VmmKilled,
    /// The kernel ended the VMM because the server's memory, with the VMM's own, passed its limit.
    OutOfMemory,
    /// The VMM has gone and nothing says why.
    Vanished,
    /// The host was restarted under it.
    HostRestarted,
    /// It came from another host and could not run here.
    DidNotArrive,
    /// It goes on at another host, which is not what was said of it here.
    WentElsewhere,
}

impl EndKind {
    /// The code shown in `state_reason`.
    pub fn code(self) -> &'static str {
        match self {
            EndKind::GuestPoweredOff => "guest_powered_off",
            EndKind::GuestReset => "guest_reset",
            EndKind::TripleFault => "triple_fault",
            EndKind::GuestPanicked => "guest_panicked",
            EndKind::Asked => "forced_off",
            EndKind::KvmError => "kvm_error",
            EndKind::VmmCrashed => "vmm_crashed",
            EndKind::VmmKilled => "vmm_killed",
            EndKind::OutOfMemory => "out_of_memory",
            EndKind::Vanished => "vmm_vanished",
            EndKind::HostRestarted => "host_restarted",
            EndKind::DidNotArrive => "did_not_arrive",
            EndKind::WentElsewhere => "two_owners",
        }
    }
}

impl End {
    /// Puts together what is known. The last will says most: it was written by the VMM itself. `oom_kills` is how
    /// often the kernel ended a process in the server's control group for want of memory.
    pub fn of(will: Option<Will>, status: Option<ExitStatus>, oom_kills: u64, now_ms: i64) -> End {
        if let Some(will) = will {
            let (kind, detail) = match will.reason {
                Reason::PoweredOff => (EndKind::GuestPoweredOff, "the guest powered itself off".to_owned()),
                Reason::Reset => (EndKind::GuestReset, "the guest asked for a reset".to_owned()),
                Reason::TripleFault => (
                    EndKind::TripleFault,
                    "a virtual CPU faulted while handling a fault twice over".to_owned(),
                ),
                Reason::GuestPanicked => (EndKind::GuestPanicked, "the guest's kernel crashed".to_owned()),
                Reason::Asked => (EndKind::Asked, "the machine was forced off".to_owned()),
                Reason::KvmError(words) => (EndKind::KvmError, format!("KVM could not go on: {words}")),
                Reason::Crashed(words) => (EndKind::VmmCrashed, format!("the VMM has a bug: {words}")),
            };
            return End { kind, detail, at_ms: i64::try_from(will.at_unix_ms).unwrap_or(now_ms) };
        }
        let (kind, detail) = match status {
            // SIGKILL is what the kernel sends then; an adopted VMM is nobody's child and tells no status.
            Some(ExitStatus::Signal(9)) | None if oom_kills > 0 => (
                EndKind::OutOfMemory,
                "the server's memory with its VMM's passed the limit of its control group".to_owned(),
            ),
            Some(ExitStatus::Signal(signal)) => {
                (EndKind::VmmKilled, format!("the VMM was killed by signal {signal}"))
            }
            Some(ExitStatus::Code(code)) => (
                EndKind::VmmCrashed,
                format!("the VMM left with status {code} and no last will; see its log"),
            ),
            None => (EndKind::Vanished, "the VMM has gone and left no last will; see its log".to_owned()),
        };
        End { kind, detail, at_ms: now_ms }
    }

    /// The host was restarted since the machine was started.
    pub fn host_restarted(now_ms: i64) -> End {
        let detail = "the host was restarted under it".to_owned();
        End { kind: EndKind::HostRestarted, detail, at_ms: now_ms }
    }

    /// Whether a policy of restarting after failures applies.
    pub fn is_failure(&self) -> bool {
        !matches!(self.kind, EndKind::GuestPoweredOff | EndKind::Asked | EndKind::HostRestarted)
    }

    /// As callers see it.
    pub fn reason(&self) -> StateReason {
        StateReason {
            code: self.kind.code().to_owned(),
            detail: self.detail.clone(),
            at: Time::from_unix_ms(self.at_ms),
        }
    }
}
