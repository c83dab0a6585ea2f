package cri

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/cri/images"
)

// ListImages lists the images of the node.
func (s *Server) ListImages(ctx context.Context, r *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	list, err := s.listImages(ctx, r.GetFilter())
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ListImagesResponse{Images: list}, nil
}

// StreamImages is ListImages in pieces.
func (s *Server) StreamImages(r *runtimeapi.StreamImagesRequest, out runtimeapi.ImageService_StreamImagesServer) error {
	list, err := s.listImages(out.Context(), r.GetFilter())
	if err != nil {
		return err
	}
	return inPieces(list, func(p []*runtimeapi.Image) error {
		return out.Send(&runtimeapi.StreamImagesResponse{Images: p})
	})
}

func (s *Server) listImages(ctx context.Context, f *runtimeapi.ImageFilter) ([]*runtimeapi.Image, error) {
	if ref := f.GetImage().GetImage(); ref != "" {
		image, err := s.cfg.Images.Get(ctx, ref)
		if errdefs.IsNotFound(err) {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list images: %w", err)
		}
		return []*runtimeapi.Image{criImage(image)}, nil
	}
	all, err := s.cfg.Images.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	list := make([]*runtimeapi.Image, 0, len(all))
	for _, image := range all {
		list = append(list, criImage(image))
	}
	return list, nil
}

func criImage(i images.Image) *runtimeapi.Image {
	out := &runtimeapi.Image{
		Id: i.ID, RepoTags: i.RepoTags, RepoDigests: i.RepoDigests, Size: max(i.Size, 1), Username: i.Username, Pinned: i.Pinned,
		Spec: &runtimeapi.ImageSpec{Image: i.ID, Annotations: i.Annotations},
	}
	if i.UID != nil {
		out.Uid = &runtimeapi.Int64Value{Value: *i.UID}
	}
	return out
}

// ImageStatus answers without an image for one that is not there.
func (s *Server) ImageStatus(ctx context.Context, r *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	image, err := s.cfg.Images.Get(ctx, r.GetImage().GetImage())
	if errdefs.IsNotFound(err) {
		return &runtimeapi.ImageStatusResponse{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("status of image: %w", err)
	}
	resp := &runtimeapi.ImageStatusResponse{Image: criImage(image)}
	if r.GetVerbose() {
		resp.Info, err = infoJSON(map[string]any{"chainID": image.ChainID, "imageSpec": image.Config, "manifest": image.Manifest, "annotations": image.Annotations})
	}
	return resp, err
}

// PullImage fetches an image, or joins an equal pull in flight.
func (s *Server) PullImage(ctx context.Context, r *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	ref := r.GetImage().GetImage()
	if ref == "" {
		return nil, fmt.Errorf("pull image: %w", badField("image.image", "", "a reference such as docker.io/library/busybox:1.36"))
	}
	if err := s.checkHandler(r.GetImage().GetRuntimeHandler()); err != nil {
		return nil, fmt.Errorf("pull image %s: %w", ref, err)
	}
	a := r.GetAuth()
	image, err := s.cfg.Images.Pull(ctx, images.PullOptions{Ref: ref, Auth: images.Auth{
		Username: a.GetUsername(), Password: a.GetPassword(), Auth: a.GetAuth(), ServerAddress: a.GetServerAddress(),
		IdentityToken: a.GetIdentityToken(), RegistryToken: a.GetRegistryToken(),
	}})
	if err != nil {
		return nil, err // it names the image
	}
	return &runtimeapi.PullImageResponse{ImageRef: image.ID}, nil
}

// RemoveImage removes all names of the image; a missing one is a removed one.
func (s *Server) RemoveImage(ctx context.Context, r *runtimeapi.RemoveImageRequest) (*runtimeapi.RemoveImageResponse, error) {
	err := s.cfg.Images.Remove(ctx, r.GetImage().GetImage())
	if err != nil && !errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("remove image: %w", err)
	}
	return &runtimeapi.RemoveImageResponse{}, nil
}

// ImageFsInfo tells how much room the images take.
func (s *Server) ImageFsInfo(ctx context.Context, _ *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	u, err := s.cfg.Images.FsInfo(ctx)
	if err != nil {
		return nil, fmt.Errorf("measure image file system: %w", err)
	}
	at := u.At
	if at.IsZero() {
		at = time.Now()
	}
	fs := &runtimeapi.FilesystemUsage{
		Timestamp: at.UnixNano(), FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: u.Mountpoint},
		UsedBytes: &runtimeapi.UInt64Value{Value: u.Bytes}, InodesUsed: &runtimeapi.UInt64Value{Value: u.Inodes},
	}
	return &runtimeapi.ImageFsInfoResponse{
		ImageFilesystems:     []*runtimeapi.FilesystemUsage{fs},
		ContainerFilesystems: []*runtimeapi.FilesystemUsage{fs},
	}, nil
}
