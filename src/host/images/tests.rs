//! Images through their facade, with records and directories of a host, and crashes at every point.
use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use model::Labels;
use model::operation::OperationState;
use serde_json::json;
use tokio::io::ReadBuf;

use super::testing::{Sample, sha256};
use super::*;
use crate::call::Idempotency;
use crate::config::Config;
use crate::volumes::testing::{Place, ended};

fn upload(name: &str) -> UploadImage {
    UploadImage { name: name.parse().unwrap(), sha256: None, length_bytes: None }
}

fn import(name: &str, source: ImportSource) -> ImportImage {
    ImportImage { name: name.parse().unwrap(), source, sha256: None, labels: Labels::default() }
}

async fn opened(place: &Place) -> Images {
    let images = Images::new(place.open().await);
    images.recover().await.unwrap();
    images
}

fn body(bytes: Vec<u8>) -> io::Cursor<Vec<u8>> {
    io::Cursor::new(bytes)
}

async fn nothing_is_left(images: &Images, place: &Place) {
    assert_eq!(place.names("images"), Vec::<String>::new());
    assert!(images.list(ListQuery::default()).await.unwrap().items.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_uploaded_image_is_ready_when_it_is_answered() {
    let place = Place::new();
    let images = opened(&place).await;
    let sample = Sample::new();
    let bytes = sample.bundle();
    let spec = UploadImage {
        sha256: Some(sha256(&bytes)),
        length_bytes: Some(bytes.len() as u64),
        ..upload("sample")
    };
    let answer = images.upload(&Call::by_host(), spec, body(bytes)).await.unwrap();
    assert_eq!(answer.body.operation.state, OperationState::Succeeded);
    let image = answer.body.resource.unwrap();
    assert_eq!(image, images.one(image.id).await.unwrap());
    assert_eq!((image.state, image.source.clone()), (ImageState::Ready, ImageSource::Upload));
    assert_eq!((image.title.as_str(), image.default_user.as_str()), ("A sample", "root"));
    assert_eq!((image.disk_bytes, image.memory_bytes_min), (1 << 20, 64 << 20));
    assert_eq!(image.sha256, sha256(&sample.manifest_bytes()));
    assert!(image.stored_bytes > 0 && image.stored_bytes < 1 << 20, "{}", image.stored_bytes);
    let boot = images.boot_files(image.id).unwrap();
    assert_eq!(boot.cmdline, "console=ttyS0");
    assert_eq!(boot.kernel.metadata().unwrap().len(), sample.files[1].1.len() as u64);
    assert!(boot.initrd.is_some() && Images::disk(&images.core.dirs, image.id).unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_put_in_the_place_of_an_images_files_is_not_opened() {
    let place = Place::new();
    let images = opened(&place).await;
    let answer =
        images.upload(&Call::by_host(), upload("sample"), body(Sample::new().bundle())).await.unwrap();
    let id = answer.body.resource.unwrap().id;
    let directory = images.core.dirs.image(id);
    let elsewhere = tempfile::tempdir().unwrap();
    let refused = |what: &str| {
        let refused = images.boot_files(id).err().unwrap_or_else(|| panic!("{what} was opened"));
        assert!(refused.detail.contains("cannot open the boot files of image"), "{what}: {refused:?}");
    };
    for role in [Role::Kernel, Role::Initrd] {
        let (file, away) = (directory.join(role.file_name()), elsewhere.path().join(role.file_name()));
        std::fs::rename(&file, &away).unwrap();
        std::os::unix::fs::symlink(&away, &file).unwrap();
        refused("a symbolic link");
        std::fs::remove_file(&file).unwrap();
        std::fs::hard_link(&away, &file).unwrap();
        refused("a hard link");
        std::fs::remove_file(&away).unwrap();
    }
    images.boot_files(id).unwrap();
    let away = elsewhere.path().join("image");
    std::fs::rename(&directory, &away).unwrap();
    std::os::unix::fs::symlink(&away, &directory).unwrap();
    refused("a directory behind a link");
    assert!(Images::disk(&images.core.dirs, id).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_key_uploads_once() {
    let place = Place::new();
    let images = opened(&place).await;
    let key = Idempotency { key: "k".to_owned(), fingerprint: "f".to_owned() };
    let call = Call { idempotency: Some(key), ..Call::by_host() };
    let first = images.upload(&call, upload("sample"), body(Sample::new().bundle())).await.unwrap();
    let again = images.upload(&call, upload("sample"), body(Vec::new())).await.unwrap();
    assert!(again.replayed);
    assert_eq!(again.body.operation.id, first.body.operation.id);
    assert_eq!(place.names("images").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_bundle_is_told_and_leaves_nothing_not_even_its_name() {
    let place = Place::new();
    let images = opened(&place).await;
    let mut bytes = Sample::new().bundle();
    bytes.truncate(9000);
    let refused = images.upload(&Call::by_host(), upload("sample"), body(bytes)).await.unwrap_err();
    assert_eq!(refused.code, Code::ImageCorrupt);
    let operation = ended(&images.core, refused.operation_id.unwrap()).await;
    assert_eq!(operation.state, OperationState::Failed);
    assert_eq!(operation.error.unwrap().code, Code::ImageCorrupt);
    nothing_is_left(&images, &place).await;
    images.upload(&Call::by_host(), upload("sample"), body(Sample::new().bundle())).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_taken_costs_the_sender_no_upload() {
    let place = Place::new();
    let images = opened(&place).await;
    images.upload(&Call::by_host(), upload("sample"), body(Sample::new().bundle())).await.unwrap();
    let refused = images.upload(&Call::by_host(), upload("sample"), NeverRead).await.unwrap_err();
    assert_eq!(refused.code, Code::AlreadyExists);
    let spec = UploadImage { length_bytes: Some(u64::MAX), ..upload("other") };
    assert_eq!(images.upload(&Call::by_host(), spec, NeverRead).await.unwrap_err().code, Code::DiskFull);
}

struct NeverRead;

impl AsyncRead for NeverRead {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        panic!("the body was read");
    }
}

/// Sends a part of a bundle, then nothing more.
struct Stuck(Vec<u8>);

impl AsyncRead for Stuck {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.0.is_empty() {
            return Poll::Pending;
        }
        let count = self.0.len().min(buffer.remaining());
        buffer.put_slice(&self.0.drain(..count).collect::<Vec<u8>>());
        Poll::Ready(Ok(()))
    }
}

/// Fails as a connection does that breaks.
struct Broken;

impl AsyncRead for Broken {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Err(io::ErrorKind::Other.into()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_breaks_undoes_the_upload() {
    let place = Place::new();
    let images = opened(&place).await;
    let refused = images.upload(&Call::by_host(), upload("sample"), Broken).await.unwrap_err();
    assert_eq!(refused.code, Code::ImageCorrupt);
    assert!(refused.detail.contains("broke off"), "{}", refused.detail);
    nothing_is_left(&images, &place).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_hangs_up_leaves_the_import_to_its_task() {
    let place = Place::new();
    let images = opened(&place).await;
    let (mut sender, receiver) = tokio::io::duplex(4096);
    let bytes = Sample::new().bundle();
    let call = Call::by_host();
    let mut uploading = Box::pin(images.upload(&call, upload("sample"), receiver));
    let began = async {
        use tokio::io::AsyncWriteExt;
        sender.write_all(&bytes[..20_000]).await.unwrap();
    };
    tokio::select! { _ = &mut uploading => panic!("it ended"), () = began => {} }
    let operation = images.list(ListQuery::default()).await.unwrap().items[0].operation_id.unwrap();
    drop(uploading);
    drop(sender);
    assert_eq!(ended(&images.core, operation).await.state, OperationState::Failed);
    nothing_is_left(&images, &place).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_of_the_import_directory_come_in_and_nothing_else_can_be_named() {
    let place = Place::new();
    let images = opened(&place).await;
    Sample::new().write(&place.directory.path().join("import/sample"));
    let from = |name: &str| ImportSource::ImportDirectory(name.to_owned());
    let answer = images.import(&Call::by_host(), import("sample", from("sample"))).await.unwrap();
    let operation = ended(&images.core, answer.body.operation.id).await;
    assert_eq!(operation.state, OperationState::Succeeded, "{:?}", operation.error);
    assert_eq!(images.one(answer.body.resource.unwrap().id).await.unwrap().state, ImageState::Ready);
    for bad in ["../toft.db", "/etc/passwd", ".", "", "absent"] {
        let refused = images.import(&Call::by_host(), import("other", from(bad))).await.unwrap_err();
        assert_eq!(refused.errors[0].pointer, "/source/import_directory", "{bad:?}");
    }
    let asked = ImportImage { sha256: Some(sha256(b"other")), ..import("third", from("sample")) };
    let answer = images.import(&Call::by_host(), asked).await.unwrap();
    let operation = ended(&images.core, answer.body.operation.id).await;
    assert_eq!(operation.error.unwrap().code, Code::ImageCorrupt);
}

fn guest_images(script: &str) -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("catalogue.toml"), "[sample]\ntitle = \"A sample\"\n").unwrap();
    let draft = directory.path().join("draft");
    std::fs::write(&draft, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o755)).unwrap();
    let copied = std::process::Command::new("cp").arg(&draft).arg(directory.path().join("build")).status();
    assert!(copied.unwrap().success());
    directory
}

async fn with_catalogue(place: &Place, guest_images: &tempfile::TempDir) -> Images {
    let guest_images_dir = Some(guest_images.path().to_owned());
    let config = Config { guest_images_dir, ..Config::new(place.directory.path()) };
    Images::new(place.open_with(config).await)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recipe_is_built_and_comes_in() {
    let (place, sample) = (Place::new(), tempfile::tempdir().unwrap());
    Sample::new().write(sample.path());
    let recipes = guest_images(&format!("cp -r {} \"$3\"", sample.path().display()));
    let images = with_catalogue(&place, &recipes).await;
    assert_eq!(images.recipes().await.unwrap()[0].name, "sample");
    let from = |name: &str| ImportSource::Catalogue(name.to_owned());
    let answer = images.import(&Call::by_host(), import("sample", from("sample"))).await.unwrap();
    let operation = ended(&images.core, answer.body.operation.id).await;
    assert_eq!(operation.state, OperationState::Succeeded, "{:?}", operation.error);
    let id = answer.body.resource.unwrap().id;
    assert_eq!(place.names("images"), [id.to_string()]);
    assert_eq!(place.names(&format!("images/{id}")), ["image.json", "initrd", "kernel", "root.raw"]);
    let refused = images.import(&Call::by_host(), import("other", from("absent"))).await.unwrap_err();
    assert!(refused.errors[0].detail.contains("there are: sample"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_build_leaves_nothing() {
    let place = Place::new();
    let recipes = guest_images("mkdir \"$3\"; echo 'progress: fetch 50' >&2; sleep 1000");
    let images = with_catalogue(&place, &recipes).await;
    let source = ImportSource::Catalogue("sample".to_owned());
    let accepted = images.import(&Call::by_host(), import("sample", source)).await.unwrap().body;
    let (id, operation) = (accepted.resource.unwrap().id, accepted.operation);
    let mut changed = images.core.store.signals().operation(operation.id);
    while images.core.store.read(move |c| operations::one(c, operation.id)).await.unwrap().progress.percent
        < 45
    {
        changed.changed().await.unwrap();
    }
    let asked = operation.id.to_string();
    let mark =
        move |tx: &Tx<'_>| Ok(tx.execute("UPDATE operations SET cancel_asked = 1 WHERE id = ?1", [asked])?);
    images.core.store.write(mark).await.unwrap();
    images.wake(id);
    assert_eq!(ended(&images.core, operation.id).await.state, OperationState::Cancelled);
    nothing_is_left(&images, &place).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_imports_run_at_once_than_the_limit() {
    let place = Place::new();
    let images = opened(&place).await;
    let bytes = Sample::new().bundle()[..5000].to_vec();
    for number in 0..limits::IMPORTS_MAX {
        let (images, bytes) = (images.clone(), bytes.clone());
        let spec = upload(&format!("sample{number}"));
        tokio::spawn(async move { images.upload(&Call::by_host(), spec, Stuck(bytes)).await });
    }
    while lock(&images.at_work).len() < limits::IMPORTS_MAX {
        tokio::task::yield_now().await;
    }
    let refused = images.upload(&Call::by_host(), upload("more"), NeverRead).await.unwrap_err();
    assert_eq!(refused.code, Code::TooMany);
    let handles: Vec<_> = lock(&images.at_work).values().cloned().collect();
    handles.iter().for_each(|handle| handle.cancel());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_a_server_boots_from_is_not_deleted_and_any_other_is() {
    let place = Place::new();
    let images = opened(&place).await;
    let answer =
        images.upload(&Call::by_host(), upload("sample"), body(Sample::new().bundle())).await.unwrap();
    let id = answer.body.resource.unwrap().id;
    let record = json!({ "image_id": id }).to_string();
    let add = move |tx: &Tx<'_>| {
        let sql = "INSERT INTO servers (id, name, labels, body) VALUES ('s', 'web1', '{}', ?1)";
        Ok(tx.execute(sql, [record])?)
    };
    images.core.store.write(add).await.unwrap();
    let refused = images.delete(&Call::by_host(), id).await.unwrap_err();
    assert_eq!(refused.code, Code::InUse);
    assert!(refused.detail.contains("web1"), "{}", refused.detail);
    images.core.store.write(|tx| Ok(tx.execute("DELETE FROM servers", [])?)).await.unwrap();
    let stale = Call { if_match: Some("\"77\"".to_owned()), ..Call::by_host() };
    assert_eq!(images.delete(&stale, id).await.unwrap_err().code, Code::StaleEtag);
    let answer = images.delete(&Call::by_host(), id).await.unwrap();
    assert_eq!(ended(&images.core, answer.body.operation.id).await.state, OperationState::Succeeded);
    nothing_is_left(&images, &place).await;
}

/// Ends the daemon's life after each commit and each step of an import and of a deletion. What the next life
/// finds is a whole image or nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_at_any_point_leaves_a_whole_image_or_nothing() {
    let mut seen = BTreeMap::new();
    for point in 1..30 {
        let place = Place::new();
        let images = Images::new(place.open_to_die_at(point).await);
        let _ = images.recover().await;
        let uploaded = images.upload(&Call::by_host(), upload("sample"), body(Sample::new().bundle())).await;
        let outlived = match &uploaded {
            Ok(answer) => {
                let id = answer.body.resource.as_ref().unwrap().id;
                match images.delete(&Call::by_host(), id).await {
                    Ok(answer) => wait_or_die(&images, answer.body.operation.id).await,
                    Err(_) => false,
                }
            }
            Err(_) => false,
        };
        drop(images);
        let images = opened(&place).await;
        let left = images.list(ListQuery::default()).await.unwrap().items;
        let names = place.names("images");
        match left.as_slice() {
            [] => assert_eq!(names, Vec::<String>::new(), "point {point}"),
            [image] => {
                assert_eq!(image.state, ImageState::Ready, "point {point}");
                assert_eq!(names, [image.id.to_string()], "point {point}");
                images.boot_files(image.id).unwrap();
            }
            more => panic!("{more:?}"),
        }
        assert!(images.core.store.read(operations::unfinished).await.unwrap().is_empty(), "point {point}");
        *seen.entry((uploaded.is_ok(), left.len())).or_insert(0) += 1;
        if outlived {
            let ends = [(false, 0), (false, 1), (true, 0)];
            assert!(ends.iter().all(|end| seen.contains_key(end)), "{seen:?}");
            return;
        }
    }
    panic!("no life was long enough: {seen:?}");
}

async fn wait_or_die(images: &Images, operation: model::OperationId) -> bool {
    let mut changed = images.core.store.signals().operation(operation);
    loop {
        match images.core.store.read(move |connection| operations::one(connection, operation)).await {
            Err(_) => return false,
            Ok(operation) if operation.state.is_final() => return true,
            Ok(_) => {}
        }
        let _ = tokio::time::timeout(std::time::Duration::from_millis(50), changed.changed()).await;
    }
}
