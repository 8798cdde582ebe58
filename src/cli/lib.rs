//! The command line: commands are calls of the public API, and say so with `--show-http`. It knows
//! nothing of the daemon's insides. `toft run` alone speaks to a VMM directly, in place of a daemon.
#![forbid(unsafe_code)]

mod bulk;
mod client;
mod console;
mod cpu;
mod error;
mod event;
mod host;
mod image;
mod interrupt;
mod limits;
mod migrate;
mod network;
mod operation;
mod output;
mod rates;
mod run;
mod server;
mod snapshot;
mod target;
mod upgrade;
mod volume;
mod wait;

use std::io::Write;
use std::process::ExitCode;

use clap::builder::Resettable;
use clap::{Args, CommandFactory, Parser, Subcommand};

use client::{Client, Endpoint};
use error::Error;
use output::Format;

/// Isolated virtual servers on one machine.
#[derive(Debug, Parser)]
#[command(name = "toft", version, max_term_width = 100, after_help = EXIT_CODES)]
struct Toft {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    noun: Noun,
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 usage or invalid values, 3 not found, 4 conflict, \
    5 may work if tried again, 6 no capacity, 7 timed out. Ctrl-C ends it by its signal, which a shell tells as 130.";

#[derive(Debug, Args)]
#[command(next_help_heading = "Options of every command")]
struct Global {
    /// Where the daemon listens: unix:PATH, http://HOST:PORT or https://HOST:PORT.
    #[arg(long, global = true, env = "TOFT_ENDPOINT", default_value = "unix:/var/lib/toft/run/toftd.sock")]
    endpoint: Endpoint,
    /// Bearer token; needed over TCP.
    #[arg(long, global = true, env = "TOFT_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// PEM file of the authority that signed the daemon's certificate.
    #[arg(long, global = true, env = "TOFT_CA_FILE")]
    ca_file: Option<std::path::PathBuf>,
    /// How to print what the daemon answers.
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    output: Format,
    /// Print each request as a curl command, and each answer's status, to standard error.
    #[arg(long, global = true)]
    show_http: bool,
    /// Wait until the work is done, with progress on a terminal.
    #[arg(long, global = true, overrides_with = "no_wait")]
    wait: bool,
    /// Print the operation and return at once (the default).
    #[arg(long, global = true)]
    no_wait: bool,
    /// Longest time --wait waits, in seconds.
    #[arg(long, global = true, default_value_t = limits::WAIT_S_DEFAULT)]
    wait_timeout_s: u64,
    /// Makes a repeated call harmless: the same key answers the same. One is made up when absent.
    #[arg(long, global = true)]
    idempotency_key: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Noun {
    /// Servers: create, list, start, stop, delete, …
    #[command(subcommand, visible_alias = "servers")]
    Server(server::Verb),
    /// Images that servers are made from.
    #[command(subcommand, visible_alias = "images")]
    Image(image::Verb),
    /// Disks of servers.
    #[command(subcommand, visible_alias = "volumes")]
    Volume(volume::Verb),
    /// What servers were at a moment.
    #[command(subcommand, visible_alias = "snapshots")]
    Snapshot(snapshot::Verb),
    /// Networks and their addresses.
    #[command(subcommand, visible_alias = "networks")]
    Network(network::Verb),
    /// Long work: look at it, wait for it, cancel it.
    #[command(subcommand, visible_alias = "operations")]
    Operation(operation::Verb),
    /// Everything that happens, in one order.
    #[command(subcommand, visible_alias = "events")]
    Event(event::Verb),
    /// The host: capacity, health, self-test.
    #[command(subcommand)]
    Host(host::Verb),
    /// Open a server's console. Ctrl-] leaves it.
    Console(console::Options),
    /// Run one machine in the foreground, with no daemon.
    Run(run::Options),
    /// Send any request and print the answer.
    Api(ApiOptions),
    /// Print a completion script for a shell.
    Completion {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
struct ApiOptions {
    /// Such as GET or POST.
    method: String,
    /// Such as /v1/servers?limit=5.
    path: String,
    /// JSON body, or @FILE to read it from a file, or @- from standard input.
    #[arg(short, long)]
    data: Option<String>,
}

/// What every verb needs.
struct Context {
    client: Client,
    format: Format,
    wait: bool,
    wait_timeout: std::time::Duration,
}

/// Runs the command line of this process to its end.
pub fn main() -> ExitCode {
    let toft = Toft::try_parse().unwrap_or_else(|error| refuse(error).exit());
    match dispatch(toft) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Error::Guest(code)) => ExitCode::from(code),
        Err(error) => {
            // A reader of our output that has gone, such as `head`, is no mistake of the user's.
            if error.is_broken_pipe() {
                return ExitCode::SUCCESS;
            }
            eprint!("{}", error.report());
            ExitCode::from(error.exit_code())
        }
    }
}

/// A mistake on the command line, told without what the environment adds: clap's usage has that as if it was to be typed.
fn refuse(error: clap::Error) -> clap::Error {
    let bare =
        |command: clap::Command, id: &'static str| command.mut_arg(id, |arg| arg.env(Resettable::Reset));
    let typed = ["endpoint", "token", "ca_file"].into_iter().fold(Toft::command(), bare);
    match error.use_stderr() {
        true => typed.try_get_matches().err().unwrap_or(error),
        false => error,
    }
}

fn dispatch(toft: Toft) -> Result<(), Error> {
    if let Noun::Completion { shell } = toft.noun {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Toft::command(), "toft", &mut script);
        return std::io::stdout().write_all(&script).map_err(Error::Output);
    }
    if let Noun::Run(options) = toft.noun {
        return run::run(&options);
    }
    interrupt::listen()?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Runtime)?;
    let result = runtime.block_on(call(toft));
    // A thread that reads standard input cannot be woken; it ends with the process.
    runtime.shutdown_background();
    result
}

async fn call(toft: Toft) -> Result<(), Error> {
    let global = toft.global;
    let context = Context {
        client: Client::new(
            global.endpoint,
            global.token,
            global.ca_file.as_deref(),
            global.show_http,
            global.idempotency_key,
        )?,
        format: global.output,
        wait: global.wait && !global.no_wait,
        wait_timeout: std::time::Duration::from_secs(global.wait_timeout_s),
    };
    match toft.noun {
        Noun::Server(verb) => verb.run(&context).await,
        Noun::Image(verb) => verb.run(&context).await,
        Noun::Volume(verb) => verb.run(&context).await,
        Noun::Snapshot(verb) => verb.run(&context).await,
        Noun::Network(verb) => verb.run(&context).await,
        Noun::Operation(verb) => verb.run(&context).await,
        Noun::Event(verb) => verb.run(&context).await,
        Noun::Host(verb) => verb.run(&context).await,
        Noun::Console(options) => console::run(&context, &options).await,
        Noun::Api(options) => api(&context, options).await,
        // Both end before a connection is thought of.
        Noun::Run(_) | Noun::Completion { .. } => Ok(()),
    }
}

async fn api(context: &Context, options: ApiOptions) -> Result<(), Error> {
    let method = options.method.to_ascii_uppercase();
    let body = match options.data.as_deref() {
        None => None,
        Some("@-") => Some(std::io::read_to_string(std::io::stdin()).map_err(Error::Input)?),
        Some(text) => match text.strip_prefix('@') {
            Some(path) => Some(target::read_text(path.as_ref())?),
            None => Some(text.to_owned()),
        },
    };
    let answer = context.client.send(&method, &options.path, body.map(String::into_bytes), &[]).await?;
    output::print_text(&String::from_utf8_lossy(&answer.body))
}

#[cfg(test)]
mod tests;
