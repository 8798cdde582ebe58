//! Images: read-only templates. They come in verified or not at all.
//! Called by the facade, and by `servers` for what a machine boots from.
//!
//! ```text
//!  stream ─▶ bundle ──┐
//!  entry ─▶ directory ├─▶ incoming (images/.incoming-<id>) ─ rename ─▶ images/<id> ─ commit ─▶ ready
//!  recipe ─▶ builder ─┘
//! ```
//! The record says `importing` from before the first byte until the last step, so what a crash leaves is removed.
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use model::image::{
    CatalogueEntry, Image, ImagePlan, ImageSource, ImageState, ImportImage, ImportSource, PatchImage,
    UploadImage,
};
use model::operation::{Accepted, Operation};
use model::page::{ListQuery, Page};
use model::{Code, ImageId};
use rusqlite::Connection;
use sys::beneath;
use tokio::io::AsyncRead;

use crate::call::{Answer, Call};
use crate::config::Dirs;
use crate::core::Shared;
use crate::error::{Error, Result};
use crate::operations::{self, Outcome};
use crate::store::Tx;
use crate::store::records as store_records;
use crate::volumes::{files, space, used_bytes};

mod bundle;
mod directory;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod import;
mod incoming;
pub mod limits;
pub mod manifest;
mod recipe;
mod records;

use bundle::Conditions;
use import::{From, Import, ImportHandle};
use manifest::{Manifest, Role};

pub(crate) const TABLES: &str = crate::table!("images");

/// Images, for callers. Cheap to clone.
#[derive(Clone)]
pub struct Images {
    core: Shared,
    at_work: Arc<AtWork>,
}

type AtWork = Mutex<BTreeMap<ImageId, Arc<ImportHandle>>>;

/// What a machine starts with, open for reading.
pub struct BootFiles {
    /// ELF with a PVH note, or bzImage.
    pub kernel: File,
    /// Initial RAM disk.
    pub initrd: Option<File>,
    /// Kernel command line.
    pub cmdline: String,
}

impl Images {
    pub(crate) fn new(core: Shared) -> Images {
        Images { core, at_work: Arc::default() }
    }

    /// Takes up what an earlier daemon left unfinished. Called once, before any other method.
    pub(crate) async fn recover(&self) -> Result<()> {
        let images: Vec<Image> = self.core.store.read(store_records::all).await?;
        for image in &images {
            match image.state {
                ImageState::Ready => {}
                ImageState::Importing => self.roll_back(image).await?,
                ImageState::Deleting => self.purge(image.id).await?,
            }
        }
        let directory = self.core.dirs.root().join("images");
        let shown = directory.display().to_string();
        let known = images.into_iter().filter(|image| image.state == ImageState::Ready).map(|image| image.id);
        let known: Vec<ImageId> = known.collect();
        self.blocking(move || remove_strangers(&directory, &known))
            .await
            .map_err(|cause| Error::file(format!("cannot tidy {shown}"), cause))
    }

    /// One page.
    pub async fn list(&self, query: ListQuery) -> Result<Page<Image>> {
        self.core.store.read(move |connection| store_records::page(connection, &query)).await
    }

    /// The image.
    pub async fn one(&self, id: ImageId) -> Result<Image> {
        self.core.store.read(move |connection| store_records::one(connection, id.0)).await
    }

    /// Name, description and labels.
    pub async fn patch(&self, call: &Call, id: ImageId, patch: PatchImage) -> Result<Answer<Image>> {
        let conditions = call.clone();
        let change = move |tx: &Tx<'_>| {
            let mut image: Image = store_records::one(tx, id.0)?;
            conditions.check_match(image.generation)?;
            records::update(tx, &mut image, patch)?;
            Ok(image)
        };
        self.core.mutate(call, change).await
    }

    /// Deletes it. Fails with `in_use` while a server boots from it. Volumes that were made from it are copies of
    /// their own and stay.
    pub async fn delete(&self, call: &Call, id: ImageId) -> Result<Answer<Accepted<Image>>> {
        let conditions = call.clone();
        let change = move |tx: &Tx<'_>| {
            let image: Image = store_records::one(tx, id.0)?;
            conditions.check_match(image.generation)?;
            let (image, operation) = records::doom(tx, image, &conditions.actor)?;
            Ok(Accepted { operation, resource: Some(image) })
        };
        let answer = self.core.mutate(call, change).await?;
        if !answer.replayed {
            let images = self.clone();
            tokio::spawn(async move {
                let purged = images.core.insist("the deletion of an image", || images.purge(id));
                if let Err(cause) = purged.await {
                    tracing::warn!(image = %id, "is deleted at the next start: {}", cause.chain());
                }
            });
        }
        Ok(answer)
    }

    /// Imports from the import directory or the catalogue.
    pub async fn import(&self, call: &Call, spec: ImportImage) -> Result<Answer<Accepted<Image>>> {
        check_sha256(spec.sha256.as_deref(), "/sha256")?;
        let (source, from) = self.check_source(spec.source).await?;
        let conditions = Conditions { stream_sha256: None, manifest_sha256: spec.sha256 };
        let answer = self
            .accept(call, move |tx, call| records::accept(tx, spec.name, spec.labels, source, &call.actor));
        let answer = answer.await?;
        if let (false, Some(image)) = (answer.replayed, &answer.body.resource) {
            let import = self.start(image.id, answer.body.operation.id, conditions).await;
            let images = self.clone();
            tokio::spawn(async move { images.finish(import, from).await });
        }
        Ok(answer)
    }

    /// What `import` would do; changes nothing. Fails as `import` would when it is called; what is in the files shows
    /// only when they come in.
    pub async fn plan(&self, call: &Call, spec: ImportImage) -> Result<ImagePlan> {
        check_sha256(spec.sha256.as_deref(), "/sha256")?;
        let (source, _) = self.check_source(spec.source).await?;
        let steps = steps(&source, spec.sha256.as_deref());
        let call = call.clone();
        let rehearsed = move |tx: &Tx<'_>| {
            check_room(tx)?;
            let (image, _) = records::accept(tx, spec.name, spec.labels, source, &call.actor)?;
            Ok(ImagePlan { image, steps })
        };
        self.core.store.rehearse(rehearsed).await
    }

    /// Imports a bundle from a stream, and answers when it has ended: the operation in the answer has succeeded.
    pub async fn upload(
        &self,
        call: &Call,
        spec: UploadImage,
        body: impl AsyncRead + Send + Unpin + 'static,
    ) -> Result<Answer<Accepted<Image>>> {
        check_sha256(spec.sha256.as_deref(), "sha256")?;
        let length = spec.length_bytes;
        space::check(&self.core.dirs.root().join("images"), 0, length.unwrap_or(0))?;
        let name = spec.name;
        let answer = self.accept(call, move |tx, call| {
            records::accept(tx, name, Default::default(), ImageSource::Upload, &call.actor)
        });
        let mut answer = answer.await?;
        let Some(image) = answer.body.resource.as_ref().filter(|_| !answer.replayed) else {
            return Ok(answer);
        };
        let (id, operation) = (image.id, answer.body.operation.id);
        let conditions = Conditions { stream_sha256: spec.sha256, manifest_sha256: None };
        let import = self.start(id, operation, conditions).await;
        let images = self.clone();
        // In a task of its own, because the caller may hang up, and then it must still be undone.
        let work =
            tokio::spawn(async move { images.finish(import, From::Stream(Box::new(body), length)).await });
        let ended = work.await.unwrap_or_else(|cause| Err(Error::internal("the import ended badly", cause)));
        ended.map_err(|cause| cause.with_operation(operation))?;
        let look = move |connection: &Connection| {
            Ok((operations::one(connection, operation)?, store_records::one(connection, id.0)?))
        };
        let (operation, image) = self.core.store.read(look).await?;
        answer.body = Accepted { operation, resource: Some(image) };
        Ok(answer)
    }

    /// One page of the recipes that can be imported, in the order of their names.
    pub async fn catalogue(&self, query: ListQuery) -> Result<Page<CatalogueEntry>> {
        let (limit, after, backwards) = store_records::by_name(&query)?;
        let mut items = self.recipes().await?;
        if backwards {
            items.reverse();
        }
        items.retain(|entry| match &after {
            Some(after) if backwards => entry.name < *after,
            Some(after) => entry.name > *after,
            None => true,
        });
        let more = items.len() > limit as usize;
        items.truncate(limit as usize);
        let next_cursor =
            items.last().filter(|_| more).map(|last| store_records::cursor(&last.name, query.sort));
        let watch_cursor = self.core.store.read(store_records::watch_cursor).await?;
        Ok(Page { items, next_cursor, watch_cursor })
    }

    async fn recipes(&self) -> Result<Vec<CatalogueEntry>> {
        let Some(guest_images) = self.core.config.guest_images_dir.clone() else { return Ok(Vec::new()) };
        let shown = guest_images.display().to_string();
        self.blocking(move || recipe::catalogue(&guest_images)).await.map_err(|cause| {
            Error::new(
                Code::HostUnprepared,
                format!("the catalogue in {shown} cannot be read: {cause}; check --guest-images"),
            )
        })
    }

    /// For `servers`: the image of this id or name when it is ready. Fails with `invalid` on `/image` otherwise.
    pub(crate) fn ready(connection: &Connection, id_or_name: &str) -> Result<Image> {
        let shown: String = id_or_name.chars().take(model::limits::NAME_CHARS_MAX).collect();
        match store_records::resolve::<Image>(connection, id_or_name)? {
            Some(image) if image.state == ImageState::Ready => Ok(image),
            Some(image) => {
                let detail = match image.state {
                    ImageState::Importing => {
                        format!("image {shown} is still being imported; wait for its operation")
                    }
                    _ => format!("image {shown} is being deleted"),
                };
                Err(Error::invalid("/image", "not_ready", detail))
            }
            None => {
                let detail = format!("there is no image {shown}; the list of images has what there is");
                Err(Error::invalid("/image", "not_found", detail))
            }
        }
    }

    /// For `servers`: what a machine of this image starts with. Blocks.
    pub(crate) fn boot_files(&self, id: ImageId) -> Result<BootFiles> {
        let directory = self.core.dirs.image(id);
        let opened = || {
            let mut bytes = Vec::new();
            open(&directory, manifest::NAME)?.read_to_end(&mut bytes)?;
            let manifest = Manifest::read(&bytes).map_err(io::Error::other)?;
            let open = |role: Role| open(&directory, role.file_name());
            let initrd = manifest.initrd.as_ref().map(|_| open(Role::Initrd)).transpose()?;
            Ok(BootFiles { kernel: open(Role::Kernel)?, initrd, cmdline: manifest.cmdline })
        };
        opened().map_err(|cause| Error::file(format!("cannot open the boot files of image {id}"), cause))
    }

    /// For `volumes`: the template of root disks, open for reading; none when the image has no disk. Blocks.
    pub(crate) fn disk(dirs: &Dirs, id: ImageId) -> io::Result<Option<File>> {
        match open(&dirs.image(id), Role::Disk.file_name()) {
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
            opened => opened.map(Some),
        }
    }

    /// For `volumes`: how much of the host's disk that template takes.
    pub(crate) fn disk_stored_bytes(&self, id: ImageId) -> u64 {
        used_bytes(std::fs::metadata(self.core.dirs.image(id).join(Role::Disk.file_name())))
    }

    /// Cancelling an import: in the cancelling transaction, see [`crate::operations::Cancel`].
    pub(crate) fn cancel(tx: &Tx<'_>, id: ImageId, operation: &Operation) -> Result<()> {
        // The mark in the operation is all there is: the import reads it in its last transaction.
        let _: Image = store_records::one(tx, id.0)?;
        debug_assert_eq!(operation.kind, records::IMPORT);
        Ok(())
    }

    /// After that transaction: wakes the import, which looks at `operations::is_cancel_asked`.
    pub(crate) fn wake(&self, id: ImageId) {
        if let Some(import) = lock(&self.at_work).get(&id) {
            import.cancel();
        }
    }

    /// Refuses a source that cannot be, before anything is recorded.
    async fn check_source(&self, source: ImportSource) -> Result<(ImageSource, From)> {
        match source {
            ImportSource::ImportDirectory(name) => {
                let import = self.core.config.import_dir.clone().unwrap_or_else(|| self.core.dirs.import());
                let pointer = "/source/import_directory";
                if !directory::is_entry_name(&name) {
                    let detail = "must be the name of one entry of the import directory, without slashes";
                    return Err(Error::invalid(pointer, "invalid", detail));
                }
                if !import.join(&name).exists() {
                    let detail = format!("there is no such entry; put it into {} first", import.display());
                    return Err(Error::invalid(pointer, "not_found", detail));
                }
                Ok((ImageSource::ImportDirectory(name.clone()), From::Entry(import, name)))
            }
            ImportSource::Catalogue(name) => {
                let Some(guest_images) = self.core.config.guest_images_dir.clone() else {
                    let detail = "this host has no catalogue; start toftd with --guest-images";
                    return Err(Error::new(Code::HostUnprepared, detail));
                };
                let known = self.recipes().await?;
                if !known.iter().any(|entry| entry.name == name) {
                    let names: Vec<&str> = known.iter().map(|entry| entry.name.as_str()).collect();
                    let detail = format!("there is no such recipe; there are: {}", names.join(", "));
                    return Err(Error::invalid("/source/catalogue", "not_found", detail));
                }
                Ok((ImageSource::Catalogue(name.clone()), From::Recipe(guest_images, name)))
            }
        }
    }

    async fn accept<F>(&self, call: &Call, record: F) -> Result<Answer<Accepted<Image>>>
    where
        F: FnOnce(&Tx<'_>, &Call) -> Result<(Image, Operation)> + Send + 'static,
    {
        let caller = call.clone();
        let change = move |tx: &Tx<'_>| {
            check_room(tx)?;
            let (image, operation) = record(tx, &caller)?;
            Ok(Accepted { operation, resource: Some(image) })
        };
        self.core.mutate(call, change).await
    }

    async fn start(&self, id: ImageId, operation: model::OperationId, conditions: Conditions) -> Import {
        let handle = Arc::new(ImportHandle::default());
        lock(&self.at_work).insert(id, handle.clone());
        // Whoever was quicker than that could wake nobody.
        let asked = self.core.store.read(move |all| operations::is_cancel_asked(all, operation)).await;
        if asked.unwrap_or(false) {
            handle.cancel();
        }
        Import { core: self.core.clone(), id, operation, conditions, handle }
    }

    async fn finish(&self, import: Import, from: From) -> Result<()> {
        let id = import.id;
        let ended = import.run(from).await;
        lock(&self.at_work).remove(&id);
        if let Err(cause) = &ended {
            tracing::info!(image = %id, "was not imported: {}", cause.chain());
        }
        ended
    }

    /// The daemon ended during an import: nothing of it is kept.
    async fn roll_back(&self, image: &Image) -> Result<()> {
        let id = image.id;
        self.remove_files(id).await?;
        self.core.checkpoint("image.rolled_back")?;
        let Some(operation) = image.operation_id else {
            return self.core.store.write(move |tx| records::forget(tx, id)).await;
        };
        let detail = "the daemon ended during the import, and nothing of the image was kept; import it again";
        let outcome = Outcome::Failed(Error::new(Code::Draining, detail));
        self.core.store.write(move |tx| records::give_up(tx, id, operation, outcome)).await
    }

    async fn purge(&self, id: ImageId) -> Result<()> {
        self.remove_files(id).await?;
        self.core.checkpoint("image.removed")?;
        self.core.store.write(move |tx| records::forget(tx, id)).await
    }

    async fn remove_files(&self, id: ImageId) -> Result<()> {
        let place = self.core.dirs.image(id);
        let removed = self.blocking(move || files::remove_tree(&place)).await;
        removed.map_err(|cause| Error::file(format!("cannot remove the files of image {id}"), cause))
    }

    async fn blocking<T, F>(&self, work: F) -> io::Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> io::Result<T> + Send + 'static,
    {
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|cause| Err(io::Error::other(cause)))
    }
}

/// Opens a file in an image's directory, and nothing that a link in its place or in the directory's leads to.
fn open(directory: &Path, file: &str) -> io::Result<File> {
    let (Some(images), Some(name)) = (directory.parent(), directory.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    beneath::open(images, &Path::new(name).join(file), beneath::Access::Read)
}

/// Removes what no ready image owns, by names that Toft gives; what else lies there is left.
fn remove_strangers(directory: &PathBuf, known: &[ImageId]) -> io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let incoming = name.strip_prefix(incoming::PREFIX);
        let Ok(id) = incoming.unwrap_or(name).parse::<ImageId>() else { continue };
        if incoming.is_some() || !known.contains(&id) {
            files::remove_tree(&entry.path())?;
        }
    }
    Ok(())
}

/// What an import would do, for people.
fn steps(source: &ImageSource, sha256: Option<&str>) -> Vec<String> {
    let bring_in = match source {
        ImageSource::Catalogue(name) => format!("build the recipe {name}"),
        ImageSource::ImportDirectory(name) => format!("read {name} of the import directory"),
        ImageSource::Upload => "receive the bundle".to_owned(),
    };
    let mut steps = vec![bring_in];
    steps.extend(sha256.map(|sha256| format!("compare its manifest with SHA-256 {sha256}")));
    steps.push("compare each file with the SHA-256 in the manifest".to_owned());
    steps
}

/// By what is recorded: whoever is accepted beside another counts.
fn check_room(connection: &Connection) -> Result<()> {
    let count: usize = connection
        .prepare_cached("SELECT count(*) FROM images WHERE json_extract(body, '$.state') = 'importing'")?
        .query_row([], |row| row.get(0))?;
    if count >= limits::IMPORTS_MAX {
        let detail = format!("{} imports are at work; wait for one to end", limits::IMPORTS_MAX);
        return Err(Error::new(Code::TooMany, detail));
    }
    Ok(())
}

fn check_sha256(sha256: Option<&str>, pointer: &str) -> Result<()> {
    match sha256 {
        Some(text) if !manifest::is_sha256(text) => {
            Err(Error::invalid(pointer, "invalid", "must be 64 lower-case hexadecimal digits"))
        }
        _ => Ok(()),
    }
}

/// A panic elsewhere leaves the map whole: each change is one insert or remove.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
