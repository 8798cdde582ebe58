//! What images write into the records, each in one transaction: accepted, arrived, given up, deleted. Nothing
//! here touches a file. `images` and `import` call it.
use model::event::EventData;
use model::image::{Image, ImageSource, ImageState, PatchImage};
use model::limits::DESCRIPTION_CHARS_MAX;
use model::operation::{Operation, Resource};
use model::{Code, ImageId, Labels, Name, OperationId, Time};
use rusqlite::Connection;
use uuid::Uuid;

use super::incoming::Arrived;
use crate::call::Actor;
use crate::error::{Error, Result};
use crate::events;
use crate::labels;
use crate::operations::{self, NewOperation, Outcome};
use crate::store::Tx;
use crate::store::records::{self, Record};

/// Kind of the operation that brings an image in.
pub(super) const IMPORT: &str = "image.import";

impl Record for Image {
    const TABLE: &'static str = "images";
    const NOUN: &'static str = "image";

    fn id(&self) -> Uuid {
        self.id.0
    }

    fn name(&self) -> &Name {
        &self.name
    }

    fn labels(&self) -> &Labels {
        &self.labels
    }

    fn touch(&mut self) {
        self.generation += 1;
        self.updated_at = Time::now();
    }
}

/// Accepts an image that is to come in.
pub(super) fn accept(
    tx: &Tx<'_>,
    name: Name,
    labels: Labels,
    source: ImageSource,
    actor: &Actor,
) -> Result<(Image, Operation)> {
    let now = Time::now();
    let mut image = Image {
        id: ImageId::new(),
        name,
        title: String::new(),
        description: String::new(),
        labels,
        state: ImageState::Importing,
        source,
        architecture: "x86_64".to_owned(),
        disk_bytes: 0,
        stored_bytes: 0,
        sha256: String::new(),
        memory_bytes_min: 0,
        default_user: String::new(),
        operation_id: None,
        generation: 1,
        created_at: now,
        updated_at: now,
    };
    let resources = vec![Resource::Image(image.id)];
    let operation =
        operations::accept(tx, NewOperation { kind: IMPORT, resources, actor, cancellable: true })?;
    image.operation_id = Some(operation.id);
    records::insert(tx, &image)?;
    announce(tx, &image, "image.created", Some(operation.id), None)?;
    Ok((image, operation))
}

/// Changes what its owner says of it.
pub(super) fn update(tx: &Tx<'_>, image: &mut Image, patch: PatchImage) -> Result<()> {
    if let Some(description) = patch.description {
        if description.chars().count() > DESCRIPTION_CHARS_MAX {
            let detail = format!("must have at most {DESCRIPTION_CHARS_MAX} characters");
            return Err(Error::invalid("/description", "too_long", detail));
        }
        image.description = description;
    }
    if let Some(name) = patch.name {
        image.name = name;
    }
    if let Some(changes) = patch.labels {
        image.labels = labels::merge(&image.labels, changes)?;
    }
    records::save(tx, image)?;
    announce(tx, image, "image.updated", None, None)
}

/// The image is complete and lies in its place. An import that was cancelled meanwhile fails here.
pub(super) fn arrive(tx: &Tx<'_>, id: ImageId, operation: OperationId, arrived: &Arrived) -> Result<()> {
    if operations::is_cancel_asked(tx, operation)? {
        return Err(Error::new(Code::WrongState, "the import was cancelled"));
    }
    let mut image: Image = records::one(tx, id.0)?;
    let manifest = &arrived.manifest;
    image.title = manifest.title.clone();
    image.state = ImageState::Ready;
    image.architecture = manifest.architecture.clone();
    image.disk_bytes =
        manifest.disk.as_ref().map(|disk| disk.size_bytes.max(manifest.min_disk_bytes)).unwrap_or(0);
    image.stored_bytes = arrived.stored_bytes;
    image.sha256 = arrived.sha256.clone();
    image.memory_bytes_min = manifest.min_memory_bytes;
    image.default_user = manifest.default_user.clone();
    image.operation_id = None;
    records::save(tx, &mut image)?;
    operations::finish(tx, operation, Outcome::Succeeded)?;
    announce(tx, &image, "image.ready", Some(operation), None)
}

/// The image does not come in: nothing of it is left.
pub(super) fn give_up(tx: &Tx<'_>, id: ImageId, operation: OperationId, outcome: Outcome) -> Result<()> {
    let outcome = match operations::is_cancel_asked(tx, operation)? {
        true => Outcome::Cancelled("cancelled by its caller; nothing of the image was kept".to_owned()),
        false => outcome,
    };
    let reason = match &outcome {
        Outcome::Failed(cause) => Some(cause.detail.clone()),
        Outcome::Cancelled(why) => Some(why.clone()),
        Outcome::Succeeded => None,
    };
    operations::finish(tx, operation, outcome)?;
    if let Some(image) = records::find::<Image>(tx, id.0)? {
        records::remove::<Image>(tx, id.0)?;
        announce(tx, &image, "image.deleted", Some(operation), reason)?;
    }
    Ok(())
}

/// Accepts the deletion of an image that nothing needs.
pub(super) fn doom(tx: &Tx<'_>, mut image: Image, actor: &Actor) -> Result<(Image, Operation)> {
    match image.state {
        ImageState::Ready => {}
        ImageState::Importing => {
            let detail = format!("image {} is being imported; cancel its operation instead", image.name);
            return Err(Error { operation_id: image.operation_id, ..Error::new(Code::WrongState, detail) });
        }
        ImageState::Deleting => {
            let detail = format!("image {} is being deleted already", image.name);
            return Err(Error::new(Code::WrongState, detail));
        }
    }
    match users(tx, image.id)?.as_slice() {
        [] => {}
        users => {
            let detail = format!(
                "servers boot from image {}: {}; delete them first (their volumes are copies of their own)",
                image.name,
                users.join(", ")
            );
            return Err(Error::new(Code::InUse, detail));
        }
    }
    match crate::snapshots::users_of_image(tx, image.id)?.as_slice() {
        [] => {}
        users => {
            let detail = format!(
                "snapshots hold servers that boot from image {}: {}; delete them first",
                image.name,
                users.join(", ")
            );
            return Err(Error::new(Code::InUse, detail));
        }
    }
    image.state = ImageState::Deleting;
    records::save(tx, &mut image)?;
    let resources = vec![Resource::Image(image.id)];
    let new = NewOperation { kind: "image.delete", resources, actor, cancellable: false };
    let operation = operations::accept(tx, new)?;
    announce(tx, &image, "image.deleting", Some(operation.id), None)?;
    Ok((image, operation))
}

/// The files of a doomed image are gone.
pub(super) fn forget(tx: &Tx<'_>, id: ImageId) -> Result<()> {
    let Some(image) = records::find::<Image>(tx, id.0)? else { return Ok(()) };
    records::remove::<Image>(tx, id.0)?;
    for operation in operations::unfinished(tx)? {
        if operation.kind == "image.delete" && operation.resources.contains(&Resource::Image(id)) {
            operations::finish(tx, operation.id, Outcome::Succeeded)?;
        }
    }
    announce(tx, &image, "image.deleted", None, None)
}

/// Names of the servers that boot from the image. Its id may also stand in what people have written of a server.
fn users(connection: &Connection, id: ImageId) -> Result<Vec<String>> {
    let mut statement = connection.prepare_cached(
        "SELECT name FROM servers WHERE json_extract(body, '$.image_id') = ?1 ORDER BY name",
    )?;
    let names = statement.query_map([id.to_string()], |row| row.get(0))?;
    Ok(names.collect::<rusqlite::Result<_>>()?)
}

fn announce(
    tx: &Tx<'_>,
    image: &Image,
    kind: &str,
    operation: Option<OperationId>,
    reason: Option<String>,
) -> Result<()> {
    let state = serde_json::to_value(image.state)?;
    let data = EventData {
        resource: Some(Resource::Image(image.id)),
        generation: Some(image.generation),
        state: state.as_str().map(str::to_owned),
        reason,
        operation_id: operation,
        ..EventData::default()
    };
    events::append(tx, kind, data)?;
    Ok(())
}
