//! `toft snapshot …`
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use http_body_util::BodyExt;
use hyper::body::Body;
use model::snapshot::{CreateSnapshot, PatchSnapshot, Snapshot};
use model::{Name, Time};
use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::error::Error;
use crate::output::{self, Row};
use crate::server::labels_text;
use crate::target::{self, ListOptions};
use crate::{Context, bulk, interrupt, wait};

/// What can be done with snapshots.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Take a snapshot of a server. One that runs stands still for a moment.
    Create(Create),
    /// Make servers that go on from where a snapshot with memory was taken.
    Clone(bulk::Clones),
    /// List snapshots.
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        options: ListOptions,
        /// Only those of this server: its name, or its id, also when it is gone.
        #[arg(long)]
        server: Option<String>,
    },
    /// Show one snapshot.
    Show {
        /// Name or id.
        snapshot: String,
    },
    /// Change a snapshot's name, words, labels or expiry.
    Update(Update),
    /// Write a snapshot as one file, to be kept elsewhere or imported by another host.
    Export(Export),
    /// Take in a snapshot that was exported, from this host or another.
    Import(Import),
    /// Delete a snapshot.
    #[command(visible_alias = "rm")]
    Delete {
        /// Name or id.
        snapshot: String,
    },
}

/// `toft snapshot create`.
#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Server's name or id.
    server: String,
    /// Unique name; made of the server's when absent.
    #[arg(long)]
    name: Option<Name>,
    /// Save the memory too, of a server that runs or is paused.
    #[arg(long)]
    memory: bool,
    /// Hold only what is new since the last snapshot of the server.
    #[arg(long)]
    incremental: bool,
    /// When to delete it by itself, such as 2031-01-31T12:00:00Z.
    #[arg(long)]
    expires_at: Option<Time>,
    /// A line for people.
    #[arg(long, default_value = "")]
    description: String,
    /// KEY=VALUE; may be given more than once.
    #[arg(long, value_parser = target::label)]
    label: Vec<(String, String)>,
}

/// `toft snapshot update`.
#[derive(Debug, Args)]
pub(crate) struct Update {
    /// Name or id.
    snapshot: String,
    /// New name.
    #[arg(long)]
    name: Option<Name>,
    /// New description.
    #[arg(long)]
    description: Option<String>,
    /// KEY=VALUE to set, KEY- to remove; may be given more than once.
    #[arg(long, value_parser = target::label_change)]
    label: Vec<(String, Option<String>)>,
    /// When to delete it by itself, such as 2031-01-31T12:00:00Z.
    #[arg(long, conflicts_with = "never_expires")]
    expires_at: Option<Time>,
    /// Never delete it by itself.
    #[arg(long)]
    never_expires: bool,
    /// Only if the snapshot is still at this generation.
    #[arg(long)]
    if_generation: Option<u64>,
}

/// `toft snapshot export`.
#[derive(Debug, Args)]
pub(crate) struct Export {
    /// Name or id.
    snapshot: String,
    /// Where to, a file that is not there yet; - for standard output. It holds the server's keys and user data too.
    file: PathBuf,
}

/// `toft snapshot import`.
#[derive(Debug, Args)]
pub(crate) struct Import {
    /// What was exported; - for standard input.
    file: PathBuf,
    /// Unique name; the one it was exported under when absent.
    #[arg(long)]
    name: Option<Name>,
}

impl Verb {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Verb::Create(create) => create.run(context).await,
            Verb::Clone(clones) => clones.run(context, "snapshots").await,
            Verb::List { options, server } => {
                let server = match server {
                    Some(server) => Some(target::resolve(&context.client, "servers", &server).await?),
                    None => None,
                };
                let parameters = [("server_id", server.as_deref())];
                let snapshots: Vec<Snapshot> =
                    target::list_with(&context.client, "snapshots", &options, &parameters).await?;
                output::many(context.format, &snapshots)
            }
            Verb::Show { snapshot } => {
                let id = target::resolve(&context.client, "snapshots", &snapshot).await?;
                let snapshot: Snapshot = context.client.get(&format!("/v1/snapshots/{id}")).await?;
                output::one(context.format, &snapshot)
            }
            Verb::Update(update) => update.run(context).await,
            Verb::Export(export) => export.run(context).await,
            Verb::Import(import) => import.run(context).await,
            Verb::Delete { snapshot } => {
                let id = target::resolve(&context.client, "snapshots", &snapshot).await?;
                let answer = context.client.send("DELETE", &format!("/v1/snapshots/{id}"), None, &[]).await?;
                wait::finish::<Snapshot>(context, &answer, "snapshots", true).await
            }
        }
    }
}

impl Create {
    async fn run(self, context: &Context) -> Result<(), Error> {
        let id = target::resolve(&context.client, "servers", &self.server).await?;
        let spec = CreateSnapshot {
            name: self.name,
            memory: self.memory,
            incremental: self.incremental,
            expires_at: self.expires_at,
            description: self.description,
            labels: target::labels(&self.label)?,
        };
        let body = serde_json::to_vec(&spec).map_err(Error::Answer)?;
        let path = format!("/v1/servers/{id}/actions/snapshot");
        let answer = context.client.send("POST", &path, Some(body), &[]).await?;
        wait::finish::<Snapshot>(context, &answer, "snapshots", false).await
    }
}

/// What stands for standard input and output.
const STANDARD: &str = "-";

impl Export {
    async fn run(self, context: &Context) -> Result<(), Error> {
        let to_standard = self.file.as_os_str() == STANDARD;
        if to_standard && std::io::stdout().is_terminal() {
            return Err(Error::Usage("a snapshot is not for terminals; name a file".to_owned()));
        }
        let id = target::resolve(&context.client, "snapshots", &self.snapshot).await?;
        let path = format!("/v1/snapshots/{id}/export");
        if to_standard {
            return receive(context, &path, &mut tokio::io::stdout(), Error::Output).await;
        }
        let unwritable = |cause| Error::Write { path: self.file.clone(), cause };
        if self.file.exists() {
            let exists = format!("{} exists; choose another name, or remove it", self.file.display());
            return Err(Error::Usage(exists));
        }
        // Under its own name it is whole.
        let mut part = self.file.clone().into_os_string();
        part.push(".part");
        let part = PathBuf::from(part);
        let file = open_part(&part).map_err(|cause| Error::Write { path: part.clone(), cause })?;
        let doomed = part.clone();
        let _unfinished = interrupt::before_end(move || drop(std::fs::remove_file(doomed)));
        let mut file = tokio::fs::File::from_std(file);
        let received = receive(context, &path, &mut file, unwritable).await;
        let kept = match received {
            Ok(()) => {
                file.sync_all().await.and_then(|()| std::fs::rename(&part, &self.file)).map_err(unwritable)
            }
            Err(cause) => Err(cause),
        };
        if kept.is_err() {
            // What remains is told by its name.
            let _ = std::fs::remove_file(&part);
        }
        kept
    }
}

/// A new file, which holds secrets, in the place of one that an export has left that was killed.
fn open_part(path: &Path) -> io::Result<File> {
    let new = || File::options().write(true).create_new(true).mode(0o600).open(path);
    let file = match new() {
        Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => {
            // Whoever still writes to it has it locked. It is not written to, because others may have it open.
            let left = File::options().write(true).open(path)?;
            left.try_lock()
                .map_err(|_| io::Error::other("another export is writing to it; if none is, remove it"))?;
            std::fs::remove_file(path)?;
            new()?
        }
        made => made?,
    };
    // Where the file system has no locks, the next export is refused as well.
    let _ = file.try_lock();
    Ok(file)
}

/// Writes the body of an answer to its end.
async fn receive(
    context: &Context,
    path: &str,
    to: &mut (impl AsyncWrite + Unpin),
    unwritable: impl Fn(io::Error) -> Error,
) -> Result<(), Error> {
    let mut body = context.client.stream(path, &[]).await?;
    let bar = wait::transfer_bar("export", body.size_hint().exact());
    while let Some(frame) = body.frame().await {
        let broke = |cause| Error::Http { endpoint: path.to_owned(), cause: Box::new(cause) };
        let Ok(piece) = frame.map_err(broke)?.into_data() else { continue };
        to.write_all(&piece).await.map_err(&unwritable)?;
        bar.inc(piece.len() as u64);
    }
    bar.finish_and_clear();
    to.flush().await.map_err(unwritable)
}

impl Import {
    async fn run(self, context: &Context) -> Result<(), Error> {
        let (file, length) = if self.file.as_os_str() == STANDARD {
            let stdin = std::io::stdin().as_fd().try_clone_to_owned();
            (stdin.map(File::from).map_err(Error::Input)?, None)
        } else {
            target::open(&self.file)?
        };
        let mut path = "/v1/snapshots".to_owned();
        if let Some(name) = &self.name {
            path.push_str(&format!("?name={name}"));
        }
        let bar = wait::transfer_bar("import", length);
        let shown = bar.clone();
        let on_progress = move |sent| shown.set_position(sent);
        let file = tokio::fs::File::from_std(file);
        let kind = "application/octet-stream";
        let answer = context.client.upload(&path, kind, file, length, on_progress).await;
        bar.finish_and_clear();
        wait::finish::<Snapshot>(context, &answer?, "snapshots", false).await
    }
}

impl Update {
    async fn run(self, context: &Context) -> Result<(), Error> {
        let id = target::resolve(&context.client, "snapshots", &self.snapshot).await?;
        let patch = PatchSnapshot {
            name: self.name,
            description: self.description,
            labels: (!self.label.is_empty()).then(|| self.label.into_iter().collect()),
            expires_at: match self.never_expires {
                true => Some(None),
                false => self.expires_at.map(Some),
            },
        };
        let body = serde_json::to_vec(&patch).map_err(Error::Answer)?;
        let etag = self.if_generation.map(|generation| format!("\"{generation}\""));
        let headers: Vec<(&str, &str)> = etag.iter().map(|etag| ("if-match", etag.as_str())).collect();
        let answer =
            context.client.send("PATCH", &format!("/v1/snapshots/{id}"), Some(body), &headers).await?;
        output::one(context.format, &answer.json::<Snapshot>()?)
    }
}

impl Row for Snapshot {
    const COLUMNS: &'static [&'static str] = &[
        "NAME",
        "STATE",
        "SERVER",
        "MEMORY",
        "DISK",
        "STORED",
        "INHERITED",
        "WORKING SET",
        "TAKEN",
        "EXPIRES",
        "LABELS",
        "PARENT",
        "ID",
    ];

    fn cells(&self) -> Vec<String> {
        let disk: u64 = self.volumes.iter().map(|volume| volume.size_bytes).sum();
        vec![
            self.name.to_string(),
            output::word(&self.state),
            self.server_name.to_string(),
            if self.memory { output::bytes(self.memory_bytes) } else { "-".to_owned() },
            if self.volumes.is_empty() { "-".to_owned() } else { output::bytes(disk) },
            output::bytes(self.stored_bytes),
            if self.inherited_bytes > 0 { output::bytes(self.inherited_bytes) } else { "-".to_owned() },
            self.working_set_bytes.map_or_else(|| "-".to_owned(), output::bytes),
            self.taken_at.map(output::time).unwrap_or_default(),
            self.expires_at.map(output::time).unwrap_or_default(),
            labels_text(&self.labels),
            self.parent_id.map_or_else(|| "-".to_owned(), |id| id.to_string()),
            self.id.to_string(),
        ]
    }

    fn name(&self) -> String {
        self.name.to_string()
    }
}
