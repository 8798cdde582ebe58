//! `toft run`: one machine in the foreground, with no daemon. This process opens everything, starts a VMM and
//! hands it over, then shows the console and passes on what is typed.
mod document;
mod vmm;

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::path::PathBuf;

use clap::Args;
use tokio::io::AsyncReadExt;
use wire::console::Ring;
use wire::control::{Command, Message, Notice, Reply, Request};
use wire::will::{Reason, Will};

use crate::console::RawTerminal;
use crate::error::Error;
use crate::{limits, output};
use document::Machine;
use vmm::Vmm;

/// Ctrl-], as in `toft console`.
const ESCAPE: u8 = 0x1d;

/// `toft run`.
#[derive(Debug, Args)]
#[command(after_help = document::HELP)]
pub(crate) struct Options {
    /// The machine as JSON; see below.
    machine: PathBuf,
    /// The VMM to run; the toft-vmm beside this program when absent.
    #[arg(long, env = "TOFT_VMM")]
    vmm: Option<PathBuf>,
    /// Where KVM is.
    #[arg(long, default_value = "/dev/kvm")]
    kvm: PathBuf,
}

/// Runs the machine to its end. A guest that powers itself off ends with success, any other end with 1.
pub(crate) fn run(options: &Options) -> Result<(), Error> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Runtime)?;
    let result = runtime.block_on(run_machine(options));
    runtime.shutdown_background();
    result
}

async fn run_machine(options: &Options) -> Result<(), Error> {
    let machine = Machine::read(&options.machine)?;
    let kvm = File::options().read(true).write(true).open(&options.kvm).map_err(|cause| Error::Machine {
        doing: format!("cannot open {} (is KVM enabled, and may you use it?)", options.kvm.display()),
        cause: cause.into(),
    })?;
    let scratch = Scratch::new().map_err(failed("cannot make a scratch directory"))?;
    let ring_file = scratch.file("console").map_err(failed("cannot make the console's file"))?;
    let will_file = scratch.file("will").map_err(failed("cannot make the last will's file"))?;
    let ring = Ring::create(ring_file, wire::limits::CONSOLE_RING_BYTES)
        .map_err(failed("cannot make the console"))?;
    let console =
        scratch.file("console").and_then(Ring::open).map_err(failed("cannot follow the console"))?;
    drop(ring);

    let vmm = Vmm::start(&vmm_path(options)?, &kvm, &will_file, &scratch)?;
    let opened = machine.open(scratch.file("console").map_err(failed("cannot open the console"))?)?;
    let descriptors: Vec<_> = opened.files.iter().map(File::as_fd).collect();
    let boot = Request { id: Typist::BOOT, command: Command::Boot(Box::new(opened.spec)) };
    vmm.channel.get_ref().send(&boot, &descriptors).map_err(failed("cannot hand the machine to the VMM"))?;
    let reason = Typist::new(vmm, console).run().await?;
    tell(reason.or_else(|| Will::read(&will_file).ok().flatten().map(|will| will.reason)))
}

fn failed<E>(doing: &'static str) -> impl FnOnce(E) -> Error
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    move |cause| Error::Machine { doing: doing.to_owned(), cause: cause.into() }
}

fn vmm_path(options: &Options) -> Result<PathBuf, Error> {
    match &options.vmm {
        Some(path) => Ok(path.clone()),
        None => {
            let own = std::env::current_exe().map_err(failed("cannot find this program's own path"))?;
            Ok(own.with_file_name("toft-vmm"))
        }
    }
}

/// How the machine ended, in words and as an exit code.
fn tell(reason: Option<Reason>) -> Result<(), Error> {
    let words = match reason {
        Some(Reason::PoweredOff) => return Ok(()),
        Some(Reason::Asked) => "stopped".to_owned(),
        Some(Reason::Reset) => "reset by the guest".to_owned(),
        Some(Reason::TripleFault) => "triple fault".to_owned(),
        Some(Reason::GuestPanicked) => "the guest's kernel panicked".to_owned(),
        Some(Reason::KvmError(words)) => format!("KVM could not go on: {words}"),
        Some(Reason::Crashed(words)) => format!("the VMM crashed: {words}"),
        None => "the VMM died without a word".to_owned(),
    };
    eprintln!("toft: the machine has ended: {words}");
    Err(Error::Guest(1))
}

/// A directory that only this user can enter, removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> io::Result<Scratch> {
        use std::os::unix::fs::DirBuilderExt;
        let path = std::env::temp_dir().join(format!("toft-{}", uuid::Uuid::now_v7().simple()));
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Scratch(path))
    }

    fn file(&self, name: &str) -> io::Result<File> {
        File::options().read(true).write(true).create(true).truncate(false).open(self.0.join(name))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed is in the temporary directory, which is emptied at boot.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Shows the console, passes on what is typed, and turns Ctrl-C and Ctrl-] into the power button.
struct Typist {
    vmm: Vmm,
    console: Ring,
    shown: u64,
    requests: u64,
    /// Typed but not yet taken by the VMM; at most one command's worth.
    pending: Vec<u8>,
    /// Request whose reply says how much of `pending` was taken.
    typing: Option<u64>,
    presses: u32,
}

impl Typist {
    /// Number of the request that boots.
    const BOOT: u64 = 1;

    fn new(vmm: Vmm, console: Ring) -> Typist {
        Typist { vmm, console, shown: 0, requests: Self::BOOT, pending: Vec::new(), typing: None, presses: 0 }
    }

    /// Runs until the VMM has gone; returns the reason it gave.
    async fn run(mut self) -> Result<Option<Reason>, Error> {
        use tokio::signal::unix::{SignalKind, signal};
        let mut interrupted = signal(SignalKind::interrupt()).map_err(Error::Runtime)?;
        let mut terminated = signal(SignalKind::terminate()).map_err(Error::Runtime)?;
        let mut stdin = tokio::io::stdin();
        let mut typed = vec![0; wire::limits::CONSOLE_INPUT_BYTES_MAX];
        let mut open = true;
        let raw = io::stdin().is_terminal().then(RawTerminal::enter).flatten();
        if raw.is_some() {
            eprint!("Ctrl-] presses the power button; three times ends the machine\r\n");
        }
        self.ask(Command::WatchConsole { seen: 0 })?;
        let mut reason = None;
        loop {
            tokio::select! {
                message = self.vmm.receive() => match message? {
                    None => break,
                    Some(Message::Notice(Notice::Exiting(why))) => reason = Some(why),
                    Some(message) => self.hear(message).await?,
                },
                read = stdin.read(&mut typed), if open && self.pending.is_empty() => {
                    let length = read.map_err(Error::Input)?;
                    open = length > 0;
                    self.type_in(&typed[..length], raw.is_some())?;
                }
                _ = interrupted.recv() => self.press()?,
                // A supervisor that says so means it; a person may first be asked for patience.
                _ = terminated.recv() => self.ask(Command::Quit).map(drop)?,
            }
        }
        self.show()?;
        Ok(reason)
    }

    fn ask(&mut self, command: Command) -> Result<u64, Error> {
        self.requests += 1;
        let request = Request { id: self.requests, command };
        match self.vmm.channel.get_ref().send(&request, &[]) {
            Ok(()) => Ok(request.id),
            // Its end is told by the next receive.
            Err(wire::channel::Error::Socket(cause)) if cause.kind() == io::ErrorKind::BrokenPipe => {
                Ok(request.id)
            }
            Err(cause) => {
                Err(Error::Machine { doing: "cannot speak to the VMM".into(), cause: cause.into() })
            }
        }
    }

    async fn hear(&mut self, message: Message) -> Result<(), Error> {
        match message {
            Message::Notice(Notice::Console { .. }) => {
                self.show()?;
                self.ask(Command::WatchConsole { seen: self.shown })?;
            }
            Message::Notice(Notice::DeviceFault { device, detail }) => {
                eprint!("toft: the guest broke {device}: {detail}\r\n");
            }
            Message::Reply { id, result: Err(fault) } if id == Self::BOOT => {
                return Err(Error::Machine {
                    doing: "the machine cannot be built".into(),
                    cause: fault.into(),
                });
            }
            Message::Reply { id, result } if Some(id) == self.typing => {
                let taken = match result {
                    Ok(Reply::Taken { bytes }) => usize::try_from(bytes).unwrap_or(usize::MAX),
                    _ => 0,
                };
                self.pending.drain(..taken.min(self.pending.len()));
                if taken == 0 {
                    // The guest reads slowly; asking again at once would only burn time.
                    tokio::time::sleep(limits::TYPING_PAUSE).await;
                }
                self.typing = None;
                self.send_pending()?;
            }
            Message::Reply { .. } | Message::Notice(_) => {}
        }
        Ok(())
    }

    fn show(&mut self) -> Result<(), Error> {
        loop {
            let piece =
                self.console.read(self.shown, 64 * 1024).map_err(failed("cannot read the console"))?;
            if piece.data.is_empty() {
                return Ok(());
            }
            self.shown = piece.end();
            output::print_bytes(&piece.data)?;
        }
    }

    fn type_in(&mut self, typed: &[u8], raw: bool) -> Result<(), Error> {
        let escapes = typed.iter().filter(|&&byte| raw && byte == ESCAPE).count();
        self.pending.extend(typed.iter().filter(|&&byte| !raw || byte != ESCAPE));
        for _ in 0..escapes {
            self.press()?;
        }
        self.send_pending()
    }

    fn send_pending(&mut self) -> Result<(), Error> {
        use base64::Engine;
        if self.typing.is_none() && !self.pending.is_empty() {
            let data_base64 = base64::engine::general_purpose::STANDARD.encode(&self.pending);
            self.typing = Some(self.ask(Command::ConsoleInput { data_base64 })?);
        }
        Ok(())
    }

    /// First the guest is asked, then the VMM.
    fn press(&mut self) -> Result<(), Error> {
        self.presses += 1;
        let command = if self.presses < 3 { Command::PressPowerButton } else { Command::Quit };
        self.ask(command).map(drop)
    }
}
