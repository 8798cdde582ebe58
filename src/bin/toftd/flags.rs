//! The daemon's flags and what they come to. It starts nothing; `main` does.
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context;
use clap::{Parser, Subcommand};
use host::Config;
use host::tokens::Tokens;
use http::{TcpListen, TlsFiles, UnixListen};

/// Keeps this host's servers and serves the API.
#[derive(Parser)]
#[command(name = "toftd", version)]
pub(crate) struct Flags {
    /// Where everything is kept.
    #[arg(long, env = "TOFT_STATE_DIR", default_value = "/var/lib/toft", global = true)]
    pub(crate) state_dir: PathBuf,
    /// What must not outlive a restart of the host; every user must be able to reach it.
    #[arg(long, default_value = "/run/toft")]
    pub(crate) run_dir: PathBuf,
    /// Unix socket of the API; run/toftd.sock in the state directory when absent.
    #[arg(long)]
    pub(crate) socket: Option<PathBuf>,
    /// Group id whose members may use the socket beside root and the daemon's own user.
    #[arg(long, value_name = "GID")]
    pub(crate) socket_group: Option<u32>,
    /// Address and port of the API for holders of tokens; beyond loopback only with TLS.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) listen: Option<SocketAddr>,
    /// Certificate chain for --listen, PEM.
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "listen"])]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Private key for --listen, PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Address and port at which other hosts may ask to bring servers here, with a ticket; nobody may when absent.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) migration_listen: Option<SocketAddr>,
    /// The VMM's binary; toft-vmm beside this one when absent.
    #[arg(long, value_name = "FILE")]
    pub(crate) vmm: Option<PathBuf>,
    /// Device of KVM.
    #[arg(long, value_name = "FILE", default_value = "/dev/kvm")]
    pub(crate) kvm: PathBuf,
    /// Control group of the host below which each server has its own.
    #[arg(long, env = "TOFT_CGROUP", value_name = "NAME", default_value = "toft", value_parser = cgroup)]
    pub(crate) cgroup: String,
    /// Where images are imported from by name; import/ in the state directory when absent.
    #[arg(long, value_name = "DIR")]
    pub(crate) import_dir: Option<PathBuf>,
    /// The catalogue's recipes and what was built of them.
    #[arg(long, value_name = "DIR")]
    pub(crate) guest_images: Option<PathBuf>,
    /// Memory that servers may have in all, in bytes; the host's own less a reserve when absent.
    #[arg(long, value_name = "BYTES")]
    pub(crate) memory_bytes: Option<u64>,
    /// VMMs that are kept ready, and taps with them, so that servers start sooner; each takes 2 MB. 0 for none.
    #[arg(long, value_name = "NUMBER", default_value_t = 2, value_parser = shells)]
    pub(crate) warm_shells: usize,
    /// What is logged, such as `info` or `info,host=debug`.
    #[arg(long, env = "TOFT_LOG", default_value = "info", global = true)]
    pub(crate) log: String,
    /// Something else than serving.
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// Something else than serving. It works beside a daemon that runs.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Access tokens of the API.
    #[command(subcommand)]
    Token(Token),
}

/// What can be done about tokens.
#[derive(Subcommand)]
pub(crate) enum Token {
    /// Makes one and prints its secret, which is never shown again.
    Create {
        /// What it is for.
        name: String,
        /// When it stops working, such as 2031-01-31T12:00:00Z; without, it works until it is revoked.
        #[arg(long, value_name = "TIME", value_parser = still_to_come)]
        expires_at: Option<model::Time>,
    },
    /// Lists them without their secrets.
    List,
    /// Makes one worthless.
    Revoke {
        /// Its id, or its name where no other has it.
        token: String,
    },
}

fn shells(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count) if count <= host::limits::WARM_SHELLS_MAX => Ok(count),
        _ => Err(format!("must be a number from 0 to {}", host::limits::WARM_SHELLS_MAX)),
    }
}

fn still_to_come(text: &str) -> Result<model::Time, String> {
    let time: model::Time = text.parse().map_err(|cause: model::time::BadTime| cause.to_string())?;
    if time > model::Time::now() { Ok(time) } else { Err("must be a time that is still to come".to_owned()) }
}

fn cgroup(text: &str) -> Result<String, String> {
    match text {
        "" | "." | ".." => Err("must be the name of a directory".to_owned()),
        text if text.contains('/') => Err("must be a name and not a path".to_owned()),
        text => Ok(text.to_owned()),
    }
}

impl Flags {
    /// What the host is configured with.
    pub(crate) fn host(&self) -> anyhow::Result<Config> {
        let mut config = Config::new(&self.state_dir);
        config.import_dir.clone_from(&self.import_dir);
        config.guest_images_dir.clone_from(&self.guest_images);
        config.memory_bytes = self.memory_bytes;
        config.warm_shells = self.warm_shells;
        #[cfg(debug_assertions)]
        {
            config.checkpoint = crate::checkpoint::ordered()?.unwrap_or(config.checkpoint);
            config.late_commits = std::env::var_os("TOFT_LATE_COMMITS").is_some();
        }
        Ok(config)
    }

    /// Where the API is served.
    pub(crate) fn http(&self) -> http::Config {
        let socket = self.socket.clone().unwrap_or_else(|| self.state_dir.join("run/toftd.sock"));
        let tls = self.tls_cert.clone().zip(self.tls_key.clone());
        http::Config {
            unix: Some(UnixListen { path: socket, group_id: self.socket_group }),
            tcp: self.listen.map(|address| TcpListen {
                address,
                tls: tls.map(|(certificate, key)| TlsFiles { certificates: certificate, key }),
            }),
        }
    }

    /// The VMM's binary.
    pub(crate) fn vmm(&self) -> anyhow::Result<PathBuf> {
        match &self.vmm {
            Some(vmm) => Ok(vmm.clone()),
            None => {
                Ok(std::env::current_exe().context("cannot find this binary")?.with_file_name("toft-vmm"))
            }
        }
    }
}

impl Token {
    /// Does it.
    pub(crate) async fn run(self, flags: &Flags) -> anyhow::Result<()> {
        if let Token::Create { name, expires_at } = self {
            let tokens = Tokens::open(&flags.state_dir).await?;
            println!("{}", tokens.create(&name, expires_at).await?.1);
            return Ok(());
        }
        let tokens = Tokens::open_existing(&flags.state_dir).await?;
        let all = tokens.list().await?;
        if let Token::Revoke { token } = self {
            let id = match (token.parse(), all.iter().filter(|one| one.name == token).collect::<Vec<_>>()) {
                (Ok(id), _) => id,
                (_, named) => match named[..] {
                    [one] => one.id,
                    [] => anyhow::bail!("no token is named {token:?}; `toftd token list` shows them"),
                    _ => anyhow::bail!("{} tokens are named {token:?}; give the id of one", named.len()),
                },
            };
            tokens.revoke(id).await?;
            return Ok(());
        }
        let width = all.iter().map(|token| token.name.chars().count()).max().unwrap_or(0).max(4);
        println!("{:36}  {:24}  {:width$}  EXPIRES", "ID", "CREATED", "NAME");
        for token in all {
            let end = match token.expires_at {
                Some(at) if at <= model::Time::now() => format!("{at}, expired"),
                Some(at) => at.to_string(),
                None => "-".to_owned(),
            };
            println!("{}  {:24}  {:width$}  {end}", token.id, token.created_at.to_string(), token.name);
        }
        Ok(())
    }
}
