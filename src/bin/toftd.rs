//! The daemon: flags, log, host, API, until it is told to stop. Servers run on without it.
#![forbid(unsafe_code)]

use std::sync::Arc;

use clap::Parser;
use host::network::HostPlumbing;
use host::vmms::Launcher;
use tokio::signal::unix::{SignalKind, signal};

#[cfg(debug_assertions)]
#[path = "toftd/checkpoint.rs"]
mod checkpoint;
#[path = "toftd/flags.rs"]
mod flags;

/// Heaps of all threads together. Those that wait for the disk come and go, and with one each kept 1.3 MB for what the
/// largest of their jobs had needed.
const HEAPS: u8 = 2;

fn main() -> anyhow::Result<()> {
    sys::thread::share_heaps(HEAPS);
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(run())
}

async fn run() -> anyhow::Result<()> {
    let mut flags = flags::Flags::parse();
    let filter = tracing_subscriber::EnvFilter::try_new(&flags.log)?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    if let Some(flags::Command::Token(token)) = flags.command.take() {
        return token.run(&flags).await;
    }
    let (mut terminated, mut interrupted) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    // Whoever opens a file on which there is a lease has the kernel tell its holder by this one, which ends a process that
    // does not listen.
    let _lease_broken = signal(SignalKind::io())?;
    let launcher = Arc::new(Launcher::new(flags.vmm()?, &flags.kvm, &flags.cgroup));
    let config = flags.host()?;
    let plumbing = HostPlumbing::new(&flags.run_dir).watched(config.checkpoint.clone());
    let host = host::Host::open(config, launcher, Arc::new(plumbing)).await?;
    if let Some(address) = flags.migration_listen {
        host.migrations().listen(address).await?;
    }
    let stop = async {
        tokio::select! { _ = terminated.recv() => (), _ = interrupted.recv() => () }
    };
    let served = http::serve(host.clone(), &flags.http(), stop).await;
    host.close().await;
    Ok(served?)
}
