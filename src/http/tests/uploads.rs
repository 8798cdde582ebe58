//! Images sent as a stream: whole ones become images, broken ones leave nothing.
use model::image::{CatalogueEntry, Image, ImagePlan, ImageState};
use model::operation::Accepted;
use model::page::Page;
use model::{Code, Problem};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::served::{Sent, Served, within};

/// The import directory's image as one tar, its manifest first.
fn bundle(served: &Served) -> Vec<u8> {
    let directory = served.stage.config().import_dir.unwrap().join("tiny");
    let mut tar = tar::Builder::new(Vec::new());
    for name in ["image.json", "kernel", "initrd", "root.raw"] {
        tar.append_path_with_name(directory.join(name), name).unwrap();
    }
    tar.into_inner().unwrap()
}

async fn images(served: &Served, name: &str) -> Vec<Image> {
    let path = format!("/v1/images?name={name}");
    served.call("GET", &path, Sent::nothing()).await.json::<Page<Image>>(200).items
}

/// Begins a chunked upload over a connection of its own.
pub(super) async fn begin(served: &Served, name: &str) -> UnixStream {
    begin_with(served, name, "").await
}

/// As [`begin`], with more lines of the head.
pub(super) async fn begin_with(served: &Served, name: &str, more: &str) -> UnixStream {
    begin_bare(served, name, &format!("prefer: wait=20\r\n{more}")).await
}

/// The same without waiting.
pub(super) async fn begin_bare(served: &Served, name: &str, more: &str) -> UnixStream {
    let mut stream = UnixStream::connect(served.socket()).await.unwrap();
    let head = format!(
        "POST /v1/images?name={name} HTTP/1.1\r\nhost: toft\r\ncontent-type: application/x-tar\r\n\
         transfer-encoding: chunked\r\n{more}\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

pub(super) async fn send(stream: &mut UnixStream, piece: &[u8]) {
    stream.write_all(format!("{:x}\r\n", piece.len()).as_bytes()).await.unwrap();
    stream.write_all(piece).await.unwrap();
    stream.write_all(b"\r\n").await.unwrap();
}

#[tokio::test]
async fn a_whole_bundle_becomes_an_image() {
    let served = Served::start().await;
    let tar = bundle(&served);
    let sent = Sent::text("application/x-tar", tar.clone()).with("prefer", "wait=20");
    let answer = served.call("POST", "/v1/images?name=sent", sent).await;
    let image = answer.json::<Accepted<Image>>(201).resource.unwrap();
    assert_eq!((image.name.as_str(), image.state), ("sent", ImageState::Ready));
    assert_eq!(answer.header("location"), format!("/v1/images/{}", image.id));

    let mut stream = begin(&served, "chunked").await;
    for piece in tar.chunks(50_000) {
        send(&mut stream, piece).await;
    }
    stream.write_all(b"0\r\n\r\n").await.unwrap();
    let mut status = [0; 12];
    within(stream.read_exact(&mut status)).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 201");
    assert_eq!(images(&served, "chunked").await[0].sha256, image.sha256);
    served.stop().await;
}

#[tokio::test]
async fn a_dry_run_says_what_would_be_imported_or_why_not_and_imports_nothing() {
    let served = Served::start().await;
    let path = "/v1/images?dry_run=true";
    let plan = async |name: &str, entry: &str| {
        let body = json!({ "name": name, "source": { "import_directory": entry } });
        served.call("POST", path, body).await
    };
    let answer: ImagePlan = plan("another", "tiny").await.json(200);
    assert_eq!((answer.image.name.as_str(), answer.image.state), ("another", ImageState::Importing));
    assert!(answer.steps[0].contains("tiny"), "{answer:?}");
    plan("tiny", "tiny").await.problem(Code::AlreadyExists);
    let absent = plan("another", "absent").await.problem(Code::Invalid);
    assert_eq!(absent.errors[0].pointer, "/source/import_directory");
    let bundle = Sent::text("application/x-tar", bundle(&served));
    let refused = served.call("POST", &format!("{path}&name=sent"), bundle).await;
    assert_eq!(refused.problem(Code::InvalidRequest).errors[0].pointer, "dry_run");
    let page: Page<Image> = served.call("GET", "/v1/images", Sent::nothing()).await.json(200);
    assert_eq!(page.items.iter().map(|image| image.name.as_str()).collect::<Vec<_>>(), ["tiny"]);
    served.stop().await;
}

#[tokio::test]
async fn an_image_is_renamed_and_described_and_servers_keep_it() {
    let served = Served::start().await;
    let image = images(&served, "tiny").await.remove(0);
    let body = json!({ "name": "web1", "image": "tiny", "memory_bytes": 128 << 20 });
    let sent = Sent::from(body).with("prefer", "wait=20");
    let server: Value = served.call("POST", "/v1/servers", sent).await.json(201);
    let path = format!("/v1/images/{}", image.id);
    let patch = |body: Value| Sent::text("application/merge-patch+json", body.to_string());
    let change = json!({ "name": "small", "description": "d", "labels": { "tier": "low" } });
    let stale = patch(change.clone()).with("if-match", "\"999\"");
    served.call("PATCH", &path, stale).await.problem(Code::StaleEtag);
    let tag = format!("\"{}\"", image.generation);
    let answer = served.call("PATCH", &path, patch(change).with("if-match", &tag)).await;
    let changed: Image = answer.json(200);
    assert_eq!((changed.name.as_str(), changed.description.as_str()), ("small", "d"));
    assert_eq!((changed.labels.value("tier"), changed.sha256.as_str()), (Some("low"), image.sha256.as_str()));
    assert!(changed.generation > image.generation);
    assert_eq!(answer.header("etag"), format!("\"{}\"", changed.generation));
    let removed = patch(json!({ "description": null, "labels": { "tier": null } }));
    let removed: Image = served.call("PATCH", &path, removed).await.json(200);
    assert_eq!((removed.description.as_str(), removed.labels.value("tier")), ("", None));
    let long = patch(json!({ "description": "x".repeat(1025) }));
    let problem = served.call("PATCH", &path, long).await.problem(Code::Invalid);
    assert_eq!(problem.errors[0].pointer, "/description");
    served.call("PATCH", &path, patch(json!({ "name": null }))).await.problem(Code::Invalid);
    // Whatever it is called, it cannot go while a server boots from it, and the server still starts.
    served.call("DELETE", &path, Sent::nothing()).await.problem(Code::InUse);
    let server = format!("/v1/servers/{}", server["resource"]["id"].as_str().unwrap());
    for (verb, body) in [("stop", json!({ "grace_s": 0 })), ("start", json!({}))] {
        let sent = Sent::from(body).with("prefer", "wait=20");
        served.call("POST", &format!("{server}/actions/{verb}"), sent).await.json::<Value>(200);
    }
    served.stop().await;
}

#[tokio::test]
async fn the_catalogue_is_a_list_like_any_other() {
    let recipes = tempfile::tempdir().unwrap();
    let entry = |name: &str| format!("[{name}]\ntitle = \"{name}\"\ndescription = \"d\"\n");
    std::fs::write(recipes.path().join("catalogue.toml"), ["b", "c", "a"].map(entry).concat()).unwrap();
    let directory = recipes.path().to_owned();
    let served = Served::start_with(|config| config.guest_images_dir = Some(directory)).await;
    for (sort, names) in
        [("", ["a", "b", "c"]), ("&sort=name", ["a", "b", "c"]), ("&sort=-name", ["c", "b", "a"])]
    {
        let path = format!("/v1/images/catalogue?limit=2{sort}");
        let first: Page<CatalogueEntry> = served.call("GET", &path, Sent::nothing()).await.json(200);
        let next = format!("{path}&cursor={}", first.next_cursor.unwrap());
        let second: Page<CatalogueEntry> = served.call("GET", &next, Sent::nothing()).await.json(200);
        assert_eq!(second.next_cursor, None);
        let all = first.items.iter().chain(&second.items).map(|entry| entry.name.as_str());
        assert_eq!(all.collect::<Vec<_>>(), names, "{sort}");
    }
    let path = "/v1/images/catalogue?fields=name";
    let page: Value = served.call("GET", path, Sent::nothing()).await.json(200);
    assert_eq!(page["items"][0], json!({ "name": "a" }));
    assert!(page["watch_cursor"].is_u64());
    served.stop().await;
}

#[tokio::test]
async fn a_bundle_with_another_checksum_than_it_says_is_not_kept() {
    let served = Served::start().await;
    let path = format!("/v1/images?name=sent&sha256={}", "0".repeat(64));
    let sent = Sent::text("application/x-tar", bundle(&served)).with("prefer", "wait=20");
    let problem: Problem = served.call("POST", &path, sent).await.problem(Code::ImageCorrupt);
    assert!(problem.detail.to_lowercase().contains("sha"), "{problem:?}");
    assert_eq!(images(&served, "sent").await, []);
    served.stop().await;
}

#[tokio::test]
async fn an_upload_that_breaks_off_leaves_nothing() {
    let served = Served::start().await;
    let tar = bundle(&served);
    let mut stream = begin(&served, "broken").await;
    send(&mut stream, &tar[..100_000]).await;
    // The name is taken as soon as the upload is known, so its absence afterwards means it was undone.
    drop(stream);
    let gone = async {
        loop {
            let sent = Sent::text("application/x-tar", tar.clone()).with("prefer", "wait=20");
            let answer = served.call("POST", "/v1/images?name=broken", sent).await;
            if answer.status == 201 {
                break;
            }
            answer.problem(Code::AlreadyExists);
        }
    };
    within(gone).await;
    assert_eq!(images(&served, "broken").await.len(), 1);
    served.stop().await;
}

#[tokio::test]
async fn who_sends_on_though_it_is_refused_gets_to_read_why() {
    let served = Served::start().await;
    let mut stream = begin(&served, "noise").await;
    for _ in 0..64 {
        // No bundle from its first bytes on.
        within(send(&mut stream, &vec![0x5a; 256 << 10])).await;
    }
    within(stream.write_all(b"0\r\n\r\n")).await.unwrap();
    let mut status = [0; 12];
    within(stream.read_exact(&mut status)).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 422");
    assert!(images(&served, "noise").await.is_empty());
    served.stop().await;
}

#[tokio::test]
async fn more_uploads_than_there_is_room_for_are_told_to_wait() {
    let served = Served::start().await;
    let mut open = Vec::new();
    for number in 0..crate::limits::UPLOADS_MAX {
        let mut stream = begin(&served, &format!("upload{number}")).await;
        send(&mut stream, &bundle(&served)[..512]).await;
        open.push(stream);
    }
    // A connection is accepted before it is read, so the last upload may not have begun yet.
    let refused = async {
        loop {
            let sent = Sent::text("application/x-tar", bundle(&served)).with("prefer", "wait=20");
            let answer = served.call("POST", "/v1/images?name=more", sent).await;
            if answer.status == 429 {
                return answer;
            }
            let image = images(&served, "more").await[0].id;
            let delete = Sent::nothing().with("prefer", "wait=20");
            assert_eq!(served.call("DELETE", &format!("/v1/images/{image}"), delete).await.status, 200);
        }
    };
    within(refused).await.problem(Code::TooMany);
    drop(open);
    served.stop().await;
}
