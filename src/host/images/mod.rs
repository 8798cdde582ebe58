//! Images: read-only templates. They come in verified or not at all.
//! Called by the facade, and by `servers` for what a machine boots from.
use std::fs::File;

use model::image::{CatalogueEntry, Image, ImportImage, UploadImage};
use model::operation::{Accepted, Operation};
use model::page::{ListQuery, Page};
use model::{Code, ImageId};
use rusqlite::Connection;
use tokio::io::AsyncRead;

use crate::call::{Answer, Call};
use crate::core::Shared;
use crate::error::{Error, Result};
use crate::store::Tx;

pub(crate) const TABLES: &str = crate::table!("images");

/// Images, for callers. Cheap to clone.
#[derive(Clone)]
pub struct Images {
    core: Shared,
}

/// What a machine starts with, open for reading.
pub struct BootFiles {
    /// ELF with a PVH note, or bzImage.
    pub kernel: File,
    /// Initial RAM disk.
    pub initrd: Option<File>,
    /// Kernel command line.
    pub cmdline: String,
}

fn unbuilt() -> Error {
    Error::new(Code::HostUnprepared, "images are not built yet")
}

impl Images {
    pub(crate) fn new(core: Shared) -> Images {
        Images { core }
    }

    /// Takes up what an earlier daemon left unfinished. Called once, before any other method.
    pub(crate) async fn recover(&self) -> Result<()> {
        Ok(())
    }

    /// One page.
    pub async fn list(&self, query: ListQuery) -> Result<Page<Image>> {
        let _ = (&self.core, query);
        Err(unbuilt())
    }

    /// The image.
    pub async fn one(&self, id: ImageId) -> Result<Image> {
        let _ = id;
        Err(unbuilt())
    }

    /// Deletes it. Fails with `in_use` while a volume was made from it and needs it.
    pub async fn delete(&self, call: &Call, id: ImageId) -> Result<Answer<Accepted<Image>>> {
        let _ = (call, id);
        Err(unbuilt())
    }

    /// Imports from the import directory or the catalogue.
    pub async fn import(&self, call: &Call, spec: ImportImage) -> Result<Answer<Accepted<Image>>> {
        let _ = (call, spec);
        Err(unbuilt())
    }

    /// Imports a bundle from a stream.
    pub async fn upload(
        &self,
        call: &Call,
        spec: UploadImage,
        body: impl AsyncRead + Send + Unpin + 'static,
    ) -> Result<Answer<Accepted<Image>>> {
        let _ = (call, spec, body);
        Err(unbuilt())
    }

    /// Recipes that can be imported.
    pub async fn catalogue(&self) -> Result<Vec<CatalogueEntry>> {
        Err(unbuilt())
    }

    /// For `servers`: the image of this id or name when it is ready. Fails with `invalid` on `/image` otherwise.
    pub(crate) fn ready(connection: &Connection, id_or_name: &str) -> Result<Image> {
        let _ = (connection, id_or_name);
        Err(unbuilt())
    }

    /// For `servers`: what a machine of this image starts with.
    pub(crate) async fn boot_files(&self, id: ImageId) -> Result<BootFiles> {
        let _ = id;
        Err(unbuilt())
    }

    /// Cancelling an import: in the cancelling transaction, see [`crate::operations::Cancel`].
    pub(crate) fn cancel(tx: &Tx<'_>, id: ImageId, operation: &Operation) -> Result<()> {
        let _ = (tx, id, operation);
        Ok(())
    }

    /// After that transaction: wakes the import, which looks at `operations::is_cancel_asked`.
    pub(crate) fn wake(&self, id: ImageId) {
        let _ = id;
    }
}
