//! What each command of the wire does to the machine. Checks and effects only; connections are the loop's.
use std::os::fd::OwnedFd;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use wire::control::{Command, Fault, FaultCode, MachineState, Notice, PROTOCOL, Reply};
use wire::limits::CONSOLE_INPUT_BYTES_MAX;
use wire::machine::{MachineSpec, OnReset};
use wire::migration::ReceiveSpec;
use wire::saved::{Clock, RestoreSpec};
use wire::will::Reason;

use super::Shell;
use crate::log;
use crate::machine::{self, Chassis, Machine};

type Result<T> = std::result::Result<T, Fault>;

fn fault(code: FaultCode, detail: impl Into<String>) -> Fault {
    Fault { code, detail: detail.into() }
}

impl From<machine::Error> for Fault {
    fn from(error: machine::Error) -> Fault {
        fault(error.code(), log::chain(&error))
    }
}

impl Shell {
    /// Does what a peer commands. Descriptors that go with the reply are put into `handles`.
    pub(super) fn obey(
        &mut self,
        token: u64,
        command: Command,
        descriptors: Vec<OwnedFd>,
        handles: &mut Vec<OwnedFd>,
    ) -> Result<Reply> {
        // Whoever commands may have heard from the other end what this one has yet to do.
        if self.machine.as_ref().is_some_and(Machine::has_chore) {
            self.move_on(false);
        }
        match command {
            Command::Hello { protocol: _ } => Ok(Reply::Hello {
                protocol: PROTOCOL,
                version: env!("CARGO_PKG_VERSION").to_owned(),
                state: self.state(),
                console_written: self.machine.as_ref().map_or(0, |machine| machine.console().written()),
                sandbox: self.sandbox,
            }),
            Command::Label { label } => {
                if label.chars().any(char::is_control) {
                    return Err(fault(FaultCode::Invalid, "a label has printable characters only"));
                }
                sys::title::set_last_word(&label);
                Ok(Reply::Done)
            }
            Command::Prepare(size) => self.prepare(size),
            Command::Boot(spec) => {
                self.build(*spec, descriptors)?;
                self.begin()
            }
            Command::Build(spec) => self.build(*spec, descriptors).map(done),
            Command::Restore(spec) => self.restore(*spec, descriptors),
            Command::Save(spec) => {
                let checked = spec.check(descriptors.len());
                checked.map_err(|error| fault(FaultCode::Invalid, error.to_string()))?;
                self.machine()?.save(&spec, descriptors).map(done).map_err(Fault::from)
            }
            Command::CancelSave => {
                self.machine()?.cancel_save();
                Ok(Reply::Done)
            }
            Command::SaveStatus => Ok(Reply::Save(self.machine()?.save_status())),
            Command::CopyDisks(spec) => {
                self.machine()?.copy_disks(&spec, descriptors).map(done).map_err(Fault::from)
            }
            Command::CancelCopy => {
                self.machine()?.cancel_copy();
                Ok(Reply::Done)
            }
            Command::CopyStatus => Ok(Reply::Copy(self.machine()?.copy_status())),
            Command::Settle => self.machine()?.settle().map(done).map_err(Fault::from),
            Command::CancelSettle => {
                self.machine()?.cancel_settle();
                Ok(Reply::Done)
            }
            Command::MemoryStatus => Ok(Reply::Memory(Box::new(self.machine()?.memory_status()?))),
            Command::Handles => {
                let count = |many: usize| u16::try_from(many).unwrap_or(u16::MAX);
                let (opened, nics, disks) = self.machine()?.handles()?;
                *handles = opened;
                Ok(Reply::Handles { nics: count(nics), disks: Some(count(disks)) })
            }
            Command::Send(spec) => {
                let checked = spec.check(descriptors.len());
                checked.map_err(|error| fault(FaultCode::Invalid, error.to_string()))?;
                self.machine()?.send(&spec, descriptors).map(done).map_err(Fault::from)
            }
            Command::Receive(spec) => self.receive(*spec, descriptors),
            Command::CancelMigration => self.machine()?.cancel_move().map(done).map_err(Fault::from),
            Command::MigrationStatus => Ok(Reply::Migration(self.move_on(false).map(Box::new))),
            Command::CommitMigration => self.machine()?.commit_move().map(done).map_err(Fault::from),
            Command::SettleMigration { owner } => {
                self.machine()?.settle_move(owner).map(done).map_err(Fault::from)
            }
            Command::Reconnect(spec) => {
                let checked = spec.check(descriptors.len());
                checked.map_err(|error| fault(FaultCode::Invalid, error.to_string()))?;
                self.machine()?.reconnect(&spec, descriptors).map(done).map_err(Fault::from)
            }
            Command::LimitMigration { limits } => {
                let checked = limits.check();
                checked.map_err(|error| fault(FaultCode::Invalid, error.to_string()))?;
                self.machine()?.limit_move(limits).map(done).map_err(Fault::from)
            }
            Command::Pause => self.machine()?.pause(Clock::Continue).map(done).map_err(Fault::from),
            Command::Park => self.machine()?.pause(Clock::Advance).map(done).map_err(Fault::from),
            Command::Resume if self.is_unbegun => self.begin(),
            Command::Resume => self.machine()?.resume().map(done).map_err(Fault::from),
            Command::PressPowerButton => {
                self.machine()?.press_power_button();
                Ok(Reply::Done)
            }
            Command::Reset => {
                self.machine()?.check_resettable()?;
                self.rebuild()
            }
            Command::Quit => {
                self.reason = Some(Reason::Asked);
                Ok(Reply::Done)
            }
            Command::Stats => Ok(Reply::Stats(Box::new(self.machine()?.stats()))),
            Command::WatchConsole { seen } => {
                self.machine()?;
                if let Some(connection) = self.connections.get_mut(&token) {
                    connection.console_seen = Some(seen);
                }
                self.arm_console();
                Ok(Reply::Done)
            }
            Command::ConsoleInput { data_base64 } => {
                let bytes = decode(&data_base64)?;
                Ok(Reply::Taken { bytes: self.machine()?.type_on_console(&bytes) as u64 })
            }
            Command::SetBalloon { target_bytes } => {
                self.machine()?.set_balloon(target_bytes).map(done).map_err(Fault::from)
            }
            Command::LimitDisk { disk, limits } => {
                self.machine()?.limit_disk(disk, limits).map(done).map_err(Fault::from)
            }
            Command::LimitNic { nic, rx, tx } => {
                self.machine()?.limit_nic(nic, rx, tx).map(done).map_err(Fault::from)
            }
        }
    }

    fn state(&self) -> MachineState {
        match (&self.reason, &self.machine) {
            (Some(_), _) => MachineState::Exiting,
            (None, None) => MachineState::Shell,
            (None, Some(machine)) if machine.is_paused() => MachineState::Paused,
            (None, Some(_)) => MachineState::Running,
        }
    }

    fn machine(&mut self) -> Result<&mut Machine> {
        self.machine
            .as_mut()
            .ok_or_else(|| fault(FaultCode::WrongState, "there is no machine yet; send Boot first"))
    }

    fn check_shell(&self) -> Result<()> {
        match &self.machine {
            None => Ok(()),
            Some(_) => Err(fault(FaultCode::WrongState, "there is a machine already; send this before Boot")),
        }
    }

    fn prepare(&mut self, size: wire::machine::Chassis) -> Result<Reply> {
        self.check_shell()?;
        size.check().map_err(|error| fault(FaultCode::Invalid, error.to_string()))?;
        self.ready = Some(Chassis::new(&self.host, size)?);
        Ok(Reply::Done)
    }

    fn build(&mut self, spec: MachineSpec, descriptors: Vec<OwnedFd>) -> Result<()> {
        if self.machine.is_some() {
            return Err(fault(
                FaultCode::WrongState,
                "a VMM boots one machine; start another VMM for another",
            ));
        }
        spec.check(descriptors.len()).map_err(|error| fault(FaultCode::Invalid, error.to_string()))?;
        let ready = self.ready.take_if(|ready| ready.fits(&spec.chassis()));
        self.machine = Some(Machine::build(&self.host, spec, descriptors, &self.bell, ready)?);
        self.is_unbegun = true;
        Ok(())
    }

    /// Lets a machine run that was built for its kernel.
    fn begin(&mut self) -> Result<Reply> {
        self.machine()?.resume()?;
        (self.is_unbegun, self.has_built) = (false, true);
        self.tell_all(&Notice::Booted { resets: 0 });
        Ok(Reply::Done)
    }

    fn restore(&mut self, spec: RestoreSpec, descriptors: Vec<OwnedFd>) -> Result<Reply> {
        if self.machine.is_some() {
            return Err(fault(
                FaultCode::WrongState,
                "a VMM holds one machine; start another VMM to restore into",
            ));
        }
        spec.check(descriptors.len()).map_err(|error| fault(FaultCode::Invalid, error.to_string()))?;
        let ready = self.ready.take_if(|ready| ready.fits(&spec.machine.chassis()));
        self.machine = Some(Machine::restore(&self.host, spec, descriptors, &self.bell, ready)?);
        self.has_built = true;
        self.tell_all(&Notice::Restored);
        Ok(Reply::Done)
    }

    fn receive(&mut self, spec: ReceiveSpec, descriptors: Vec<OwnedFd>) -> Result<Reply> {
        if self.machine.is_some() {
            return Err(fault(
                FaultCode::WrongState,
                "a VMM holds one machine; start another VMM to receive one",
            ));
        }
        spec.check(descriptors.len()).map_err(|error| fault(FaultCode::Invalid, error.to_string()))?;
        self.machine = Some(Machine::receive(&self.host, spec, descriptors, &self.bell)?);
        self.has_built = true;
        Ok(Reply::Done)
    }

    /// The guest wants a reset.
    pub(super) fn reset_asked(&mut self) {
        match self.machine.as_ref().map(Machine::on_reset) {
            None => (),
            // Some of its threads may wait for memory of which it is not known when it comes.
            Some(OnReset::Rebuild) if self.machine.as_ref().is_some_and(Machine::is_owed) => {
                self.resets_when_whole = true;
            }
            Some(OnReset::Exit) => self.reason = Some(Reason::Reset),
            Some(OnReset::Rebuild) => {
                // A failure has set the reason to exit.
                let _ = self.rebuild();
            }
        }
    }

    /// Builds the machine again. There is no way back when that fails, so the process ends with the reason.
    fn rebuild(&mut self) -> Result<Reply> {
        let host = &self.host;
        let rebuilt = self.machine.as_mut().map(|machine| machine.rebuild(host));
        match rebuilt {
            None => Ok(Reply::Done),
            Some(Ok(resets)) => {
                (self.is_unbegun, self.has_built) = (false, true);
                self.tell_all(&Notice::Booted { resets });
                // The old machine's news went with it, but its console is the new one's.
                self.tell_console();
                Ok(Reply::Done)
            }
            Some(Err(error)) => {
                let detail = format!("cannot build the machine again: {}", log::chain(&error));
                self.reason = Some(Reason::KvmError(detail.clone()));
                Err(fault(error.code(), detail))
            }
        }
    }

    /// Puts the console's one watch where the first of the peers wants to be told.
    pub(super) fn arm_console(&mut self) {
        if let Some(machine) = &self.machine {
            machine
                .console()
                .watch(self.connections.values().filter_map(|connection| connection.console_seen));
        }
    }

    /// Tells every peer whose watch has been passed, and takes its watch away.
    pub(super) fn tell_console(&mut self) {
        let Some(written) = self.machine.as_ref().map(|machine| machine.console().written()) else { return };
        let passed: Vec<u64> = self
            .connections
            .iter_mut()
            .filter(|(_, connection)| connection.console_seen.is_some_and(|seen| seen < written))
            .map(|(token, connection)| {
                connection.console_seen = None;
                *token
            })
            .collect();
        passed.into_iter().for_each(|token| self.tell(token, Notice::Console { written }));
        self.arm_console();
    }
}

fn done((): ()) -> Reply {
    Reply::Done
}

fn decode(text: &str) -> Result<Vec<u8>> {
    let bytes = STANDARD.decode(text);
    let bytes = bytes.map_err(|error| fault(FaultCode::Invalid, format!("data_base64: {error}")))?;
    if bytes.len() > CONSOLE_INPUT_BYTES_MAX {
        let detail =
            format!("data_base64: {} bytes; send at most {CONSOLE_INPUT_BYTES_MAX} at once", bytes.len());
        return Err(fault(FaultCode::Invalid, detail));
    }
    Ok(bytes)
}
